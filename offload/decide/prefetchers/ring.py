"""Whole layers in their order, into a ring of a few layers' room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offload.decide.prefetchers.base import Outlook, PrefetchRule, register


@dataclass(frozen=True)
class Params:
    """`layers`: how many the ring has room for, the one that computes among them."""

    layers: int = 3

    def __post_init__(self) -> None:
        if self.layers < 2:
            raise ValueError(f"layers is {self.layers}, and one computes while another is loaded")


@register
class Ring(PrefetchRule):
    """All experts of the next layers, layer by layer and by their numbers, whatever a router will say.

    The ring has what is ahead of the layer that computes. So a layer's places are free when it has been computed, and
    the layer that comes into reach then is loaded into them; of what computes, only what the event does not use.

    Source: SE-MoE, arXiv 2205.10034, its ring memory.
    """

    name = "ring"
    Params = Params
    least = 0.0

    def __init__(self, params: Any = None) -> None:
        super().__init__(params)
        self.reach = self.params.layers - 1

    def choose(self, outlook: Outlook) -> None:
        for lead in range(1, self.params.layers):
            for prediction in sorted(outlook.absent(lead)):
                offer = outlook.offer(prediction)
                if not offer.find_room():
                    break
                offer.begin()
