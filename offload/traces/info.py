"""`offload trace info`: what a trace is, and what its locality promises a cache, as figures, tables and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from cache.traces.locality import SEGMENT_LENGTHS, load_entropy, segment_routing, token_overlap, union_sizes
from cache.traces.miss_ratio import MissRatioCurve, lru_miss_ratio_curve
from cache.traces.segment_cache import RATIOS, segment_cache
from cache.traces.trace import DECODE, PADDING, PREFILL, Trace
from offload.system.sizes import format_bytes
from offload.terminal.plot import new_figure, save_figure

CAPACITIES = (0.1, 0.25, 0.5, 0.75)
_SEQUENCES_WANTED = 10  # for SCH, whose authors take every 16th of many


def trace_info(trace: Trace) -> dict[str, Any]:
    """Everything there is to say, as plain JSON types; what cannot be computed is None. Reads the whole trace.

    Capacities are fractions f of a layer's E experts, round(f * E) slots. Rates and shares are from 0 to 1.
    """
    phases = np.bincount(trace.phase, minlength=3)
    overlap, entropy = token_overlap(trace), load_entropy(trace)
    return {
        "trace": trace.name,
        "model": trace.model,
        "workload": trace.workload,
        "metadata": dict(trace.metadata),
        "sequences": trace.num_sequences,
        "tokens": trace.num_tokens,
        "prefill_tokens": int(phases[PREFILL]),
        "decode_tokens": int(phases[DECODE]),
        "padding_tokens": int(phases[PADDING]),
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "expert_bytes": trace.expert_bytes,
        "batched": trace.forward is not None,
        "scores": trace.scores is not None,
        "predicted": None if trace.predicted is None else list(trace.predicted.shape[2:]),
        "overlap": _number(overlap.mean()),
        "overlap_uniform": trace.top_k / trace.num_experts,
        "overlap_per_layer": _numbers(overlap),
        "load_entropy": _number(entropy.mean()),
        "load_entropy_per_layer": _numbers(entropy),
        "union": _union(trace),
        "segments": _segments(trace),
        "lru": _lru(trace),
    }


def slots(fraction: float, experts: int) -> int:
    """The slots of a layer's cache that holds that fraction of its experts."""
    return round(fraction * experts)


def _union(trace: Trace) -> dict[str, Any]:
    sizes = union_sizes(trace)
    result: dict[str, Any] = {}
    for phase, counts in (("prefill", sizes.prefill), ("decode", sizes.decode)):
        result[phase] = _distribution(counts) if counts.any() else None
    total = sizes.all
    result["larger_than_cache"] = [
        {
            "capacity_fraction": fraction,
            "slots": (capacity := slots(fraction, trace.num_experts)),
            "share_of_events": float(total[capacity + 1 :].sum() / total.sum()),
        }
        for fraction in CAPACITIES
    ]
    return result


def _distribution(counts: NDArray[np.int64]) -> dict[str, Any]:
    cumulated = counts.cumsum()
    return {
        "events": int(cumulated[-1]),
        "mean": float((counts * np.arange(len(counts))).sum() / cumulated[-1]),
        "p95": int(np.searchsorted(cumulated, 0.95 * cumulated[-1])),
        "max": int(np.flatnonzero(counts)[-1]),
    }


def _segments(trace: Trace) -> list[dict[str, Any]]:
    every = min(16, max(1, trace.num_sequences // _SEQUENCES_WANTED))
    layered = segment_cache(trace, every=every)
    pooled = segment_cache(trace, every=every, pooled=True)
    result = []
    for index, length in enumerate(SEGMENT_LENGTHS):
        routing = segment_routing(trace, length)
        srp, rho = routing.best()
        result.append(
            {
                "length": length,
                "segments": routing.segments,
                "srp": _number(srp),
                "srp_rho": _number(rho),
                "srp_per_layer": _numbers(np.array([routing.best(layer)[0] for layer in range(trace.num_layers)])),
                "sch_sequences": layered.sequences,
                "sch_per_layer_cache": dict(zip(map(str, RATIOS), layered.hit_rate[index].tolist(), strict=True)),
                "sch_pooled_cache": dict(zip(map(str, RATIOS), pooled.hit_rate[index].tolist(), strict=True)),
            }
        )
    return result


def _lru(trace: Trace) -> dict[str, Any]:
    def rates(curve: MissRatioCurve) -> list[float]:
        return [float(rate) for rate in curve.hit_rate]

    return {
        "slots": list(range(trace.num_experts + 1)),
        "hit_rate_cold": rates(lru_miss_ratio_curve(trace, cold=True)),
        "hit_rate_warm": rates(lru_miss_ratio_curve(trace, cold=False)),
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


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
