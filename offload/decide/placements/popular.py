"""The experts that were used most."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.types import ExpertKey
from offload.decide.placements.base import Placement, register


@register
class Popular(Placement):
    """By how many events used an expert, in a profile or in what this model computed before; of equals, those of the
    first layers. Experts that were never used are not placed.

    Source: Kamahori et al., Fiddler, arXiv 2402.07033.
    """

    name = "popular"
    needs_counts = True

    def order(self, counts: NDArray[np.int64] | None) -> list[ExpertKey]:
        if counts is None:
            return []
        flat = counts.reshape(-1)
        ranked = np.argsort(-flat, kind="stable")[: np.count_nonzero(flat)]
        return [ExpertKey(*divmod(index, self.num_experts)) for index in ranked.tolist()]
