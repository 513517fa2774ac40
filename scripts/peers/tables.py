"""The tables of peers/bench.py in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from offload.system.sizes import format_bytes
from scripts.bench.common import markdown as table

Case = dict[str, Any]


def markdown(cases: list[Case]) -> str:
    """Tables of each group, routed by the model or by a trace, with the reasons of those who could not run."""
    parts = []
    for key in dict.fromkeys((case["group"], case["trace"]) for case in cases):
        own = [case for case in cases if (case["group"], case["trace"]) == key]
        parts += [f"### {key[0]}" + (f", routed by {key[1]}" if key[1] else ""), _group(own)]
    return "\n\n".join(parts) + "\n"


def _group(cases: list[Case]) -> str:
    engines = list(cases[0]["decode_tokens_per_s"])
    reasons = list(dict.fromkeys(why for case in cases for why in case["unable"].values()))

    def speeds(case: Case, field: str) -> list[str]:
        notes = {name: f" ({reasons.index(why) + 1})" for name, why in case["unable"].items()}
        return [_number(case[field][name]) + notes.get(name, "") for name in engines]

    def block(title: str, columns: list[str], cells: Callable[[Case], list[str]]) -> str:
        where = ["shape", "layers", "model", "RAM"]
        return f"{title}:\n\n" + table([*where, *columns], ([*_where(case), *cells(case)] for case in cases)).rstrip()

    blocks = [
        block(
            "Decoded tokens/s",
            [*engines, "resident"],
            lambda case: [*speeds(case, "decode_tokens_per_s"), _number(case["resident_tokens_per_s"])],
        ),
        block("Prompt tokens/s", engines, lambda case: speeds(case, "prefill_tokens_per_s")),
        block(
            "Tokens that are the same as with transformers, everything resident, and the cgroup's peak",
            engines,
            lambda case: [_agreement(case, name) for name in engines],
        ),
        block(
            "Ours beside what the machine allows",
            ["hit rate", "read a token", "touched", "disk", "memory", "limit", "share"],
            _ours,
        ),
    ]
    if reasons:
        blocks.append("\n".join(f"{number}. {why}" for number, why in enumerate(reasons, 1)))
    return "\n\n".join(blocks)


def _where(case: Case) -> list[str]:
    return [case["shape"], str(case["layers"]), format_bytes(case["model_bytes"]), format_bytes(case["memory_bytes"])]


def _agreement(case: Case, name: str) -> str:
    same, peak = case["same_choices"][name], case["cgroup_peak_bytes"][name]
    if same is None:
        return "-"
    return f"{same[0]} of {same[1]}" + (f", {format_bytes(peak)}" if peak else "")


def _ours(case: Case) -> list[str]:
    ours = case["ours"]
    if ours is None:
        return ["-"] * 7
    return [
        f"{ours['hit_rate']:.2f}",
        format_bytes(int(ours["read_bytes_per_token"])),
        format_bytes(int(ours["touched_bytes_per_token"])),
        f"{ours['disk_bytes_per_s'] / 1e9:.2f} GB/s",
        f"{ours['memory_bytes_per_s'] / 1e9:.1f} GB/s",
        _number(ours["limit_tokens_per_s"]),
        f"{ours['share_of_limit']:.2f}",
    ]


def _number(value: float | None) -> str:
    """Three digits that count; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
