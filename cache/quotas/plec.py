"""By how many experts a layer is predicted to use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.quota import Quota, even, proportional, register
from cache.quotas.distinct import SEQUENCES
from cache.traces.profiles import activation_matrices
from cache.traces.trace import Trace
from cache.types import RoutingEvent


@dataclass(frozen=True)
class PLECParams:
    """`rate`: by how much a use fades those before it. `uses`: how many uses of a layer's experts are looked ahead."""

    rate: float = 0.001
    uses: int = 256

    def __post_init__(self) -> None:
        if not (0 < self.rate < 1 and self.uses >= 1):
            raise ValueError(f"rate lies between 0 and 1, not {self.rate}; uses is at least 1, not {self.uses}")


@register
class PLEC(Quota):
    """In proportion to the number of distinct experts that each layer is predicted to use next, anew before every pass.

    ExpertFlow's predictive locality-aware expert cache asks a network, before the first layer, which experts a batch
    will use. Ours expects that uses go on as they went of late: of an expert with the share s of its layer's uses, the
    next n will have at least one with the probability 1 - (1 - s)^n. With a profile it begins with the profile's
    shares; without one with an even division, and goes by the first pass from then on.

    Recycling: in ExpertFlow the slots of layers that are done go to later ones within a pass. With one token a pass
    that would give away what the next token needs. Ours recycles between two passes, when all layers are done: what a
    layer is not predicted to need goes to another, and all that fits stays.
    Source: He et al., ExpertFlow, arXiv 2410.17954.
    """

    name = "plec"
    Params = PLECParams
    every_pass = True
    _learnt: NDArray[np.float64] | None = None

    def learn(self, profile: Trace) -> None:
        counts = activation_matrices(profile, SEQUENCES).sum(axis=0)
        self._learnt = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def reset(self) -> None:
        super().reset()
        shape = self.num_layers, self.num_experts
        self._shares = np.zeros(shape) if self._learnt is None else self._learnt.copy()

    def observe(self, event: RoutingEvent) -> None:
        uses = sum(event.tokens)
        if not uses:
            return
        shares = self._shares[event.layer]
        kept = (1 - self.params.rate) ** uses if shares.any() else 0.0
        shares *= kept
        shares[list(event.experts)] += np.array(event.tokens) * ((1 - kept) / uses)

    def divide(self, total: int) -> list[int]:
        distinct = (1 - (1 - self._shares) ** self.params.uses).sum(axis=1)
        if not distinct.all():  # not every layer has run
            return even(total, self.num_layers, self.num_experts)
        return proportional(total, distinct.tolist(), self.num_experts)
