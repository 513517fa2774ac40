"""Routing that is planned, not recorded: as many experts a token, whatever the number there is to choose from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEW = 8
"""Experts a layer of the smallest model, and what the others use of theirs where all use as many."""


@dataclass(frozen=True)
class Routes:
    """A plan of routing, as a TraceRouter reads it: ids [T, L, K] for one sequence, all of equal weight."""

    experts: NDArray[np.uint16]
    num_experts: int

    @property
    def weights(self) -> NDArray[np.float32]:
        """[T, L, K]."""
        return np.full(self.experts.shape, 1 / self.experts.shape[2], np.float32)

    @property
    def sequence_offsets(self) -> NDArray[np.int64]:
        """One sequence."""
        return np.array([0, len(self.experts)])


def routes(plan: str, experts: int, layers: int, top_k: int, tokens: int) -> Routes:
    """Which experts each token goes to. Half of them are the same for all tokens, but where all are used in turn."""
    spread = np.arange(experts) * (experts // FEW) % experts + np.arange(experts) // FEW
    if plan == "eight":
        spread = spread[:FEW]
    kept = 0 if plan == "all" else top_k // 2
    turning = spread[kept:]
    ids = np.empty((tokens, layers, top_k), np.uint16)
    for token in range(tokens):
        changing = np.arange(token * (top_k - kept), (token + 1) * (top_k - kept)) % len(turning)
        ids[token] = np.concatenate([spread[:kept], turning[changing]])
    return Routes(ids, experts)
