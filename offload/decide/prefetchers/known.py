"""Routing that is known beforehand: everything that will be needed, one layer ahead or all of them."""

from __future__ import annotations

from dataclasses import dataclass

from offload.decide.prefetchers.base import Outlook, PrefetchRule, register


@dataclass(frozen=True)
class Params:
    """`least`: how probable an expert must be; a predictor that is right by construction says 1."""

    least: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise ValueError(f"least is {self.least}, not a probability")


@register
class PreGated(PrefetchRule):
    """All that the next layer will need, since its gate has spoken one layer before.

    Such a model is trained so; a predictor says what the gate said, at probability 1.

    Source: Hwang et al., Pre-gated MoE, arXiv 2308.12066.
    """

    name = "pre-gated"
    Params = Params
    reach = 1

    def choose(self, outlook: Outlook) -> None:
        left = outlook.known.num_layers - 1 - outlook.event.layer
        for lead in range(1, min(outlook.depth, left) + 1):
            for prediction in outlook.absent(lead):
                if prediction.probability >= self.params.least:
                    offer = outlook.offer(prediction)
                    if offer.find_room():
                        offer.begin()


@register
class ReadMe(PreGated):
    """All that this pass will need, since one router speaks for all layers before the first; the nearest layer first,
    as far as there is room.

    Nothing goes for it that the pass still needs, so what goes is what is needed last.

    Source: Cai et al., Read-ME, arXiv 2410.19123.
    """

    name = "read-me"
    reach = 0
