"""D2MoE: bits by what a token's router says, and residual planes only as far as computing takes anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import comb
from typing import Any, ClassVar

from cache.errors import PolicyError
from cache.types import ExpertKey, RoutingEvent
from offload.decide.fallbacks.base import LOW_SHARE, Candidate, Choice, Fallback, register

_DECAY = 0.9  # of an expert's uses, with every event of its layer


@dataclass(frozen=True)
class Params:
    """`planes` is the share of residual planes that are asked for on average: of int4>int3>int2, 2 + 2 * planes bits.

    `rate` is how far a use moves the thresholds that keep to it; `patience` is how long an event may wait for residual
    planes, in times of what computing its experts takes.
    """

    planes: float = 0.5
    rate: float = 0.02
    patience: float = 0.0
    low_share: float = LOW_SHARE

    def __post_init__(self) -> None:
        if not 0 <= self.planes <= 1 or not 0 < self.rate <= 1:
            raise PolicyError(f"d2moe: planes={self.planes} is from 0 to 1, rate={self.rate} above 0 and up to 1")


@register
class D2MoE(Fallback):
    """Each (token, expert) asks for bits: the more, the more router weight the token has from that expert on. An
    event's expert has the most that any of its tokens asks for, missing or not.

    The thresholds are a layer's own. Each moves a little with every use, down after a use below it, and up after one
    above, so that the mean of what is asked keeps to `planes`, whatever the weights are like.

    Missing planes come by hotness: tokens of the event, then uses, of which older ones count less. The base planes of
    all experts come first, those of the hottest leading. Residual ones follow as long as they arrive while the event is
    computed, or within the patience; where the channel still has time, the others are fetched later.

    Source: D2MoE, arXiv 2504.15299: nested bits, a bit router, and the order "hottest expert, bits first" (HEBF). Its
    bit router is trained; this rule is not. Bits depend on routing alone, but what arrives depends on time, so two runs
    may differ.
    """

    name = "d2moe"
    by_token: ClassVar[bool] = True
    base_first: ClassVar[bool] = True
    Params = Params

    def __init__(self, num_layers: int, num_experts: int, precisions: int, params: Any = None) -> None:
        super().__init__(num_layers, num_experts, precisions, params)
        self._shares = _shares(self.params.planes, precisions - 1)
        self._thresholds = [[1 - share for share in self._shares] for _ in range(num_layers)]
        self._uses = [[0.0] * num_experts for _ in range(num_layers)]
        self._each_s = 0.0

    def target(self, key: ExpertKey) -> int:
        """What is worth fetching ahead: the base plane, which every token needs."""
        return self.precisions - 1

    def targets(self, event: RoutingEvent) -> list[int]:
        """The precision that each member asks for; the thresholds and uses have seen the event then."""
        self._see(event)
        thresholds, left = self._thresholds[event.layer], _weight_left(event)
        planes = [0] * len(left)
        for plane, (threshold, share) in enumerate(zip(thresholds, self._shares, strict=True)):
            asking = [weight > threshold for weight in left]
            planes = [count + asks for count, asks in zip(planes, asking, strict=True)]
            thresholds[plane] += self.params.rate * (sum(asking) - share * len(left))
        return [self.precisions - 1 - count for count in planes]

    def hotness(self, key: ExpertKey) -> float:
        return self._uses[key.layer][key.expert]

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        there, lowest = len(event.experts) - len(candidates), self.precisions - 1
        if there:
            self._each_s = spare_s / there
        deadline_s = len(event.experts) * self._each_s * (1 + self.params.patience)
        tokens = dict(zip(event.experts, event.tokens, strict=True))
        hottest = sorted(
            range(len(candidates)),
            key=lambda i: (-tokens[candidates[i].key.expert], -self.hotness(candidates[i].key), -i),
        )
        channel_s = sum(candidate.fetch_s[lowest] for candidate in candidates)
        choices = {}
        for index in hottest:
            candidate = candidates[index]
            base_s = candidate.fetch_s[lowest]
            precision = next(
                (p for p in range(candidate.target, lowest) if channel_s + candidate.fetch_s[p] - base_s <= deadline_s),
                lowest,
            )
            channel_s += candidate.fetch_s[precision] - base_s
            choices[index] = Choice(precision, later=precision > candidate.target and channel_s <= deadline_s)
        return [choices[index] for index in range(len(candidates))]

    def _see(self, event: RoutingEvent) -> None:
        uses = self._uses[event.layer]
        uses[:] = [_DECAY * count for count in uses]
        for expert in event.experts:
            uses[expert] += 1


def _weight_left(event: RoutingEvent) -> list[float]:
    """The share of its router weight that a token has from each member on, in it and weaker ones: of several tokens the
    largest."""
    if event.before:
        return [1 - before for before in event.before]
    total = sum(event.weights) or 1.0
    return [weight / total for weight in accumulate(event.weights)]


def _shares(planes: float, count: int) -> list[float]:
    """Of all uses, those that ask for the first residual plane, for the second, ..., each of which needs the one
    before: as if each of `count` planes were asked for by itself with probability `planes`."""
    shares, reached = [], 0.0
    for asked in range(count, 0, -1):
        reached += comb(count, asked) * planes**asked * (1 - planes) ** (count - asked)
        shares.append(reached)
    return shares[::-1]
