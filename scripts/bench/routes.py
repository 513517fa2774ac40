"""Routing that is made up, not recorded: planned to the last expert, or by chance with the habits of a real one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cache.traces.trace import Trace, expert_dtype

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


def habitual(layers: int, experts: int, top_k: int, tokens: int, seed: int, ahead: int = 0) -> Trace:
    """Two sequences in which popular experts, and those used last, come again.

    With `ahead`, gates have looked so many layers ahead, and named twice as many experts as are needed.
    """
    rng = np.random.default_rng(seed)
    popularity = -0.8 * np.log(np.argsort(rng.random((layers, experts)), axis=1) + 1)
    ids = np.empty((tokens, layers, top_k), np.int64)
    scores = np.empty((tokens, layers, experts))
    last = np.zeros((layers, experts))
    for token, score in zip(ids, scores, strict=True):
        score[:] = popularity + 1.5 * last + rng.gumbel(size=last.shape)
        token[:] = np.argsort(-score, axis=1)[:, :top_k]
        last[:] = 0
        np.put_along_axis(last, token, 1, axis=1)
    weights = -np.sort(-rng.dirichlet(np.ones(top_k), (tokens, layers)), axis=2)
    trace = Trace.from_arrays(ids, weights, [0, tokens // 2, tokens], num_experts=experts)
    if not ahead:
        return trace
    looks = np.stack([np.roll(scores, -distance, axis=1) for distance in range(1, ahead + 1)], axis=2)
    seen = looks + 0.5 * rng.gumbel(size=looks.shape)
    named = np.argsort(-seen, axis=3)[..., : 2 * top_k]
    return replace(trace, predicted=named.astype(expert_dtype(experts)))
