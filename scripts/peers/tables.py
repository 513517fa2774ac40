"""The tables of peers/bench.py in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from offload.system.sizes import format_bytes

Case = dict[str, Any]
Cell = Callable[[str], str]


def markdown(result: dict[str, Any]) -> str:
    """Tables of each group, routed by the model or by a trace, with the reasons of those who could not run."""
    parts = []
    for key in dict.fromkeys((case["group"], case["trace"]) for case in result["cases"]):
        cases = [case for case in result["cases"] if (case["group"], case["trace"]) == key]
        parts += [f"### {key[0]}" + (f", routed by {key[1]}" if key[1] else ""), _group(cases)]
    return "\n\n".join(parts) + "\n"


def _group(cases: list[Case]) -> str:
    engines = list(cases[0]["decode_tokens_per_s"])
    reasons: list[str] = []

    def reason(case: Case, name: str) -> str:
        """The number of the footnote."""
        why = case["unable"].get(name)
        if why is None:
            return ""
        if why not in reasons:
            reasons.append(why)
        return f" ({reasons.index(why) + 1})"

    def speeds(case: Case, field: str) -> list[str]:
        return [_number(case[field][name]) + reason(case, name) for name in engines]

    where = ["shape", "layers", "model", "RAM"]
    blocks = [
        "Decoded tokens/s:",
        _table(
            [*where, *engines, "resident"], _rows(cases, lambda c: [*speeds(c, "decode_tokens_per_s"), _resident(c)])
        ),
        "Prompt tokens/s:",
        _table([*where, *engines], _rows(cases, lambda c: speeds(c, "prefill_tokens_per_s"))),
        "Tokens that are the same as with transformers, everything resident, and the cgroup's peak:",
        _table([*where, *engines], _rows(cases, lambda c: [_agreement(c, name) for name in engines])),
        "Ours beside what the machine allows:",
        _table(
            [*where, "hit rate", "read a token", "touched", "disk", "memory", "limit", "share"], _rows(cases, _ours)
        ),
    ]
    if reasons:
        blocks.append("\n".join(f"{number}. {why}" for number, why in enumerate(reasons, 1)))
    return "\n\n".join(blocks)


def _rows(cases: list[Case], cells: Callable[[Case], list[str]]) -> Iterable[list[str]]:
    for case in cases:
        model, memory = format_bytes(case["model_bytes"]), format_bytes(case["memory_bytes"])
        yield [case["shape"], str(case["layers"]), model, memory, *cells(case)]


def _resident(case: Case) -> str:
    return _number(case["resident_tokens_per_s"])


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


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
