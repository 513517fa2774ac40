"""What a trace is, and what its locality promises a cache, as figures."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.locality import SEGMENT_LENGTHS, load_entropy, segment_routing, token_overlap, union_sizes
from cache.traces.miss_ratio import MissRatioCurve, lru_miss_ratio_curve
from cache.traces.segment_cache import RATIOS, segment_cache
from cache.traces.trace import DECODE, PADDING, PREFILL, Trace

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
