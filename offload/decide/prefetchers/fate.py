"""As many of the next layer as there is time for, beyond the router's number where others come near."""

from __future__ import annotations

from dataclasses import dataclass

from offload.decide.prefetchers.base import Outlook, PrefetchRule, register


@dataclass(frozen=True)
class Params:
    """`near`: candidates beyond the first K are fetched, too, if they are at least so likely as the K-th, as a share
    of that."""

    near: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.near <= 1:
            raise ValueError(f"near is {self.near}, not a share")


@register
class Fate(PrefetchRule):
    """The K likeliest experts of the next layer, then the others that come near, up to as many fetches as fit the time
    until that layer: n = floor(T / time of one).

    The K are fetched whatever the time; so a layer that is wrongly predicted has its reads under way. The paper widens
    by the gates' confidence, which events do not carry; here it is the rate at which such a candidate was right.

    Source: Fang et al., Fate, arXiv 2502.12224.
    """

    name = "fate"
    Params = Params
    reach = 1

    def choose(self, outlook: Outlook) -> None:
        expected, top_k = outlook.expected(1), outlook.top_k
        if not expected:
            return
        least = self.params.near * expected[:top_k][-1].probability
        begun = 0
        for rank, prediction in enumerate(expected):
            if not outlook.is_absent(prediction):
                continue
            offer = outlook.offer(prediction)
            if rank >= top_k:
                in_time = begun + 1 <= int(outlook.starts_s(1) / outlook.fetch_s) if outlook.fetch_s else False
                if not in_time or prediction.probability < least:
                    return
            if offer.find_room():
                offer.begin()
                begun += 1
