"""The patterns of a trace's routing, as figures."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.patterns import Following, Patterns, find_patterns
from cache.traces.trace import Trace


def pattern_info(trace: Trace) -> dict[str, Any]:
    """Everything `cache.traces.patterns` finds, as plain JSON types: means over layers, and each layer's own.

    Shares are from 0 to 1; what cannot be computed is None.
    """
    found = find_patterns(trace)
    return {
        "trace": trace.name,
        "model": trace.model,
        "workload": trace.workload,
        "sequences": trace.num_sequences,
        "tokens": trace.num_tokens,
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "next_layer": _following(found.next_layer),
        "next_token": _following(found.next_token),
        "popularity": _popularity(found),
        "together": _together(found),
        "skew": {
            "largest": float(found.skew.max()),
            "layer": trace.layers[int(found.skew.argmax())],
            "mean": float(found.skew.mean()),
            "per_layer": _numbers(found.skew),
        },
    }


def _following(found: Following) -> dict[str, Any]:
    shares = {field.name: getattr(found, field.name) for field in fields(found) if field.name != "candidates"}
    return {
        "candidates": found.candidates,
        **{name: _mean(values) for name, values in shares.items()},
        **{f"{name}_per_layer": _numbers(values) for name, values in shares.items()},
    }


def _popularity(found: Patterns) -> dict[str, Any] | None:
    if found.popularity is None:
        return None
    return {
        "spearman": _mean(found.popularity.spearman),
        "spearman_per_layer": _numbers(found.popularity.spearman),
        "overlap": {str(top): _mean(shares) for top, shares in found.popularity.overlap.items()},
    }


def _together(found: Patterns) -> dict[str, Any] | None:
    if found.together is None:
        return None
    return {
        "pairs": found.together.pairs,
        "held_out": _mean(found.together.held_out),
        "seen": _mean(found.together.seen),
        "held_out_per_layer": _numbers(found.together.held_out),
        "seen_per_layer": _numbers(found.together.seen),
    }


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
