"""The tables of peers/bench.py in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from offload.system.sizes import format_bytes
from scripts.bench.common import markdown as table

Case = dict[str, Any]
Speeds = dict[str, float | None]


def markdown(cases: list[Case], where: str) -> str:
    """Tables of each group, resident or within budgets, routed by the model or by a trace; and `where` it was."""
    parts = [where[:1].upper() + where[1:] + "."]
    for key in dict.fromkeys(map(_kind, cases)):
        group, resident, trace = key
        title = f"### {group}" + (", everything in RAM" if resident else "") + (f", routed by {trace}" if trace else "")
        parts += [title, _group([case for case in cases if _kind(case) == key])]
    return "\n\n".join(parts) + "\n"


def _kind(case: Case) -> tuple[str, bool, str | None]:
    return case["group"], case["resident"], case["trace"]


def _group(cases: list[Case]) -> str:
    engines = list(cases[0]["decode_tokens_per_s"])
    reasons = list(dict.fromkeys(why for case in cases for why in case["unable"].values()))
    lengths = list(cases[0]["prompt_tokens_per_s"])

    def speeds(case: Case, found: Speeds) -> list[str]:
        notes = {name: f" ({reasons.index(why) + 1})" for name, why in case["unable"].items()}
        return [*(_number(found[name]) + notes.get(name, "") for name in engines), _over_best(found)]

    def block(title: str, columns: list[str], cells: Callable[[Case], list[list[str]]]) -> str:
        head = ["shape", "layers", "model", "RAM", "CPU", *columns]
        rows = ([*_where(case), *row] for case in cases for row in cells(case))
        return f"{title}:\n\n" + table(head, rows).rstrip()

    def decoded(case: Case) -> list[list[str]]:
        return [[*speeds(case, case["decode_tokens_per_s"]), _number(case["resident_tokens_per_s"])]]

    def prompts(case: Case) -> list[list[str]]:
        return [[length, *speeds(case, case["prompt_tokens_per_s"][length])] for length in lengths]

    over, same = (
        "ours over the best",
        "Tokens that are the same as with transformers, everything resident, and the peak",
    )
    limits = ["hit rate", "read a token", "touched", "disk", "memory", "limit", "share"]
    blocks = [
        block("Decoded tokens/s", [*engines, over, "transformers, resident"], decoded),
        block("Prompt tokens/s", ["prompt", *engines, over], prompts),
        block(same, engines, lambda case: [[_agreement(case, name) for name in engines]]),
        block("Ours beside what the machine allows", limits, lambda case: [_ours(case)]),
    ]
    if reasons:
        blocks.append("\n".join(f"{number}. {why}" for number, why in enumerate(reasons, 1)))
    return "\n\n".join(blocks)


def _where(case: Case) -> list[str]:
    ram = "all" if case["resident"] else format_bytes(case["memory_bytes"])
    return [case["shape"], str(case["layers"]), format_bytes(case["model_bytes"]), ram, case["level"]]


def _over_best(found: Speeds) -> str:
    """The first engine's speed, which is ours, over the best of the others'."""
    ours, *others = found.values()
    best = max((speed for speed in others if speed), default=None)
    return "-" if ours is None or best is None else f"{ours / best:.2f}"


def _agreement(case: Case, name: str) -> str:
    same, peak = case["same_choices"][name], case["peak_bytes"][name]
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
        f"{ours['disk_bytes_per_s'] / 1e9:.2f} GB/s" if ours["disk_bytes_per_s"] else "",
        f"{ours['memory_bytes_per_s'] / 1e9:.1f} GB/s",
        _number(ours["limit_tokens_per_s"]),
        f"{ours['share_of_limit']:.2f}",
    ]


def _number(value: float | None) -> str:
    """Three digits that count; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
