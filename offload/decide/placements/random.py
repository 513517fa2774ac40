"""Any experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.types import ExpertKey
from offload.decide.placements.base import Placement, register


@dataclass(frozen=True)
class Params:
    """`seed` chooses the order."""

    seed: int = 0


@register
class Random(Placement):
    """All experts in an order by chance, the same for the same seed. What a start with full caches is worth by itself.

    Source: folklore; HybriMoE, arXiv 2504.05897, begins so.
    """

    name = "random"
    Params = Params

    def order(self, counts: NDArray[np.int64] | None) -> list[ExpertKey]:
        order = np.random.default_rng(self.params.seed).permutation(self.num_layers * self.num_experts)
        return [ExpertKey(*divmod(index, self.num_experts)) for index in order.tolist()]
