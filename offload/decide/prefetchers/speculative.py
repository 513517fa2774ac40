"""The likeliest few of the next layer, into places of their own."""

from __future__ import annotations

from dataclasses import dataclass

from offload.decide.prefetchers.base import Outlook, PrefetchRule, register


@dataclass(frozen=True)
class Params:
    """`n`: how many experts of the next layer, and how many places hold such that nobody has used."""

    n: int = 2

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}, not positive")


@register
class Speculative(PrefetchRule):
    """The `n` likeliest experts of the next layer, those of them that are missing, whatever that costs.

    A wrong guess costs the cache nothing more: once `n` places hold experts that were fetched ahead in vain, the next
    one takes the place of such an expert. In the original these places are buffers beside the layers' caches.

    Source: Eliseev and Mazur, mixtral-offloading, arXiv 2312.17238.
    """

    name = "speculative"
    Params = Params
    reach = 1

    def choose(self, outlook: Outlook) -> None:
        for prediction in outlook.expected(1)[: self.params.n]:
            if not outlook.is_absent(prediction):
                continue
            held = outlook.held(prediction.key.layer)
            vain = [key for key in held if (key, 0) in outlook.known.unused and key not in outlook.known.predicted]
            used = [key for key in held if key not in vain] if len(vain) >= self.params.n else ()
            offer = outlook.offer(prediction)
            if offer.find_room(used):
                offer.begin()
