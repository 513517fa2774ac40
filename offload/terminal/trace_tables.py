"""`offload trace info` for people: tables, and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from cache.traces.segment_cache import RATIOS
from offload.system.sizes import format_bytes
from offload.terminal.plot import new_figure, save_figure


def info_tables(info: dict[str, Any]) -> Iterator[Table]:
    """What people read: the trace, its segments, and LRU at some capacities."""
    yield _summary(info)
    table = Table("segment", "segments", "SRP", "rho", box=None, header_style="dim")
    for kind in ("layer", "pool"):
        for ratio in RATIOS:
            table.add_column(f"SCH {kind} {ratio}K")
    for row in info["segments"]:
        caches = [*row["sch_per_layer_cache"].values(), *row["sch_pooled_cache"].values()]
        table.add_row(
            f"{row['length']} tokens",
            str(row["segments"]),
            _percent(row["srp"]),
            "-" if row["srp_rho"] is None else f"{row['srp_rho']:.2f}",
            *map(_percent, caches),
        )
    _right(table)
    yield table
    table = Table(
        "cache a layer", "slots", "LRU cold", "LRU warm", "events that need more", box=None, header_style="dim"
    )
    for row in info["union"]["larger_than_cache"]:
        table.add_row(
            f"{row['capacity_fraction']:.0%}",
            str(row["slots"]),
            _percent(info["lru"]["hit_rate_cold"][row["slots"]]),
            _percent(info["lru"]["hit_rate_warm"][row["slots"]]),
            _percent(row["share_of_events"]),
        )
    _right(table)
    yield table


def _summary(info: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    table.add_row("model", info["model"])
    table.add_row("workload", info["workload"])
    parts = [f"{info[f'{kind}_tokens']} {kind}" for kind in ("prefill", "decode", "padding") if info[f"{kind}_tokens"]]
    batches = ", some in batches" if info["batched"] else ""
    table.add_row("tokens", f"{info['tokens']} in {info['sequences']} sequences{batches}: {', '.join(parts)}")
    table.add_row("routing", f"{info['layers']} layers, top-{info['top_k']} of {info['experts']} experts")
    if info["expert_bytes"]:
        total = info["expert_bytes"] * info["layers"] * info["experts"]
        table.add_row("expert", f"{format_bytes(info['expert_bytes'])}, all of them {format_bytes(total)}")
    function = info["metadata"].get("score_function", "unknown")
    table.add_row("scores", f"of all experts, function: {function}" if info["scores"] else "of the chosen experts")
    if info["predicted"] is not None:
        layers, candidates = info["predicted"]
        table.add_row("predictions", f"{candidates} experts, {layers} {'layer' if layers == 1 else 'layers'} ahead")
    table.add_row(
        "overlap", f"{_percent(info['overlap'])} with the token before; {info['overlap_uniform']:.1%} if even"
    )
    table.add_row("load entropy", f"{_percent(info['load_entropy'])} of the largest")
    for phase in ("prefill", "decode"):
        if (union := info["union"][phase]) is not None:
            said = f"{union['mean']:.1f} on average, 95 % up to {union['p95']}, at most {union['max']}"
            table.add_row(f"experts a {phase} event", f"{said}, in {union['events']} events")
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _right(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"


def plot_info(info: dict[str, Any], path: Path) -> None:
    """Draw LRU's hit rate against capacity, and overlap and entropy by layer, into the image `path`.

    Raises OffloadError if matplotlib is missing or does not know the file's format.
    """
    figure = new_figure(width=2)
    curve, layers = figure.subplots(1, 2)
    fractions = [slots / info["experts"] for slots in info["lru"]["slots"]]
    for name in ("cold", "warm"):
        curve.plot(fractions, info["lru"][f"hit_rate_{name}"], label=f"LRU, {name}")
    curve.set(xlabel="share of a layer's experts in its cache", ylabel="hit rate", xlim=(0, 1), ylim=(0, 1))
    curve.legend()
    for key, label in (("overlap_per_layer", "overlap"), ("load_entropy_per_layer", "load entropy")):
        values = [float("nan") if value is None else value for value in info[key]]
        layers.plot(range(info["layers"]), values, marker=".", label=label)
    layers.axhline(info["overlap_uniform"], linestyle=":", color="grey", label="overlap if even")
    layers.set(xlabel="MoE layer", ylim=(0, 1))
    layers.legend()
    figure.suptitle(f"{info['model']}: {info['workload']}", wrap=True)
    save_figure(figure, path)
