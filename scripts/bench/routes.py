"""Routing that is planned, not recorded: as many experts a token, whatever the number there is to choose from."""

from __future__ import annotations

import numpy as np

from cache.traces.trace import Trace

FEW = 8
"""Experts a layer of the smallest model, and what the others use of theirs where all use as many."""


def routes(plan: str, experts: int, layers: int, top_k: int, tokens: int) -> Trace:
    """Where each token of one sequence goes, all experts of equal weight; `experts` are a multiple of FEW.

    Half of them are the same for all tokens, but where all are used in turn.
    """
    spread = np.arange(experts) * (experts // FEW) % experts + np.arange(experts) // FEW
    if plan == "eight":
        spread = spread[:FEW]
    kept = 0 if plan == "all" else top_k // 2
    turning = spread[kept:]
    ids = np.empty((tokens, layers, top_k), np.uint16)
    for token in range(tokens):
        changing = np.arange(token * (top_k - kept), (token + 1) * (top_k - kept)) % len(turning)
        ids[token] = np.concatenate([spread[:kept], turning[changing]])
    return Trace.from_arrays(ids, np.full(ids.shape, 1 / top_k), [0, tokens], num_experts=experts)
