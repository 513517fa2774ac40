"""`offload trace info --patterns` for people: the patterns of a trace beside those that their paper reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from cache.traces.patterns import LIKELIEST, PAIRS

_PAPER = {"next_layer": "50-77%", "next_token": "47-80%"}
_OVERLAPS = {"5": "60%", "10": "75%", "20": "90%"}


def pattern_tables(info: dict[str, Any]) -> Iterator[Table]:
    """What runs next, given what runs now; then how uneven experts are used."""
    table = Table(
        f"{LIKELIEST:.0%} likeliest experts", "each alone", "held out", "together", "used most", "paper",
        box=None, header_style="dim",
    )  # fmt: skip
    for key, what in (("next_layer", "next layer, same token"), ("next_token", "next token, same layer")):
        found = info[key]
        shares = (found[name] for name in ("seen", "held_out", "together", "popular"))
        table.add_row(f"{what}: {found['candidates']} of {info['experts']}", *map(_percent, shares), _PAPER[key])
    _right(table)
    yield table
    table = Table("experts' use", "here", "if even", "paper", box=None, header_style="dim")
    for row in _uses(info):
        table.add_row(*row)
    _right(table)
    yield table


def _uses(info: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    skew = info["skew"]
    yield f"most used expert, times the mean (layer {skew['layer']})", f"{skew['largest']:.2f}", "1.00", "up to 16"
    yield "the same, mean of all layers", f"{skew['mean']:.2f}", "1.00", ""
    if (together := info["together"]) is not None:
        what = f"pairs together, the {PAIRS:.0%} most frequent ({together['pairs']})"
        yield what, _percent(together["seen"]), f"{PAIRS:.0%}", "60-80%"
        yield "the same, held out", _percent(together["held_out"]), f"{PAIRS:.0%}", ""
    if (popularity := info["popularity"]) is None:
        yield "prompts beside replies", "-", "", "the trace has only one of them"
        return
    rank = popularity["spearman"]
    yield "prompts beside replies, Spearman", "-" if rank is None else f"{rank:.2f}", "0.00", "0.7 or more"
    for top, share in popularity["overlap"].items():
        yield (
            f"prompts beside replies, of the top {top}",
            _percent(share),
            f"{int(top) / info['experts']:.0%}",
            _OVERLAPS[top],
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _right(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
