"""How policies see the world: many caches at once, each a lane of an array.

A lane is one cache that evicts on its own: a layer's, or one that several layers share. Live there is one model, so
there are as many lanes as it has pools; a replay puts every sequence and capacity in lanes of its own and lets one
array operation decide for all of them. A rule written over lanes is therefore the rule that runs live.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.types import Phase, RoutingEvent

Ints = NDArray[np.int64]
Floats = NDArray[Any]
"""float32 or float64."""


@dataclass(frozen=True)
class Lanes:
    """The shape of a policy's state: `count` lanes of `layers` x `experts` columns.

    Column `c` of a lane is expert `c % experts` of its layer `c // experts`. A model has `num_layers // layers`
    lanes, in the order of its layers; where `count` is a multiple of that, the lanes are those of several copies of
    the model. `slots` is how many experts fit into each lane, int64 [count].
    """

    num_layers: int
    layers: int
    experts: int
    slots: Ints

    def __post_init__(self) -> None:
        if self.layers < 1 or self.num_layers % self.layers or self.count % (self.num_layers // self.layers):
            raise ValueError(f"{self.count} lanes of {self.layers} layers for a model of {self.num_layers}")

    @classmethod
    def shared(cls, num_layers: int, num_experts: int, slots: int | None = None) -> Lanes:
        """One lane: all layers of a model share `slots` (by default room for every expert)."""
        return cls(
            num_layers, num_layers, num_experts, np.array([num_layers * num_experts if slots is None else slots])
        )

    @classmethod
    def per_layer(cls, num_layers: int, num_experts: int, slots: int | Sequence[int] | None = None) -> Lanes:
        """A lane for each layer, of as many slots each, or of as many as stated for it."""
        return cls(
            num_layers, 1, num_experts, np.zeros(num_layers, np.int64) + (num_experts if slots is None else slots)
        )

    @property
    def count(self) -> int:
        """How many lanes there are."""
        return len(self.slots)

    @property
    def width(self) -> int:
        """Experts that a lane serves, resident or not."""
        return self.layers * self.experts

    @cached_property
    def places(self) -> list[tuple[slice, slice, int]]:
        """Where the experts of a model's layers lie: each layer's lane, columns there, and first flat index."""
        found = []
        for layer in range(self.num_layers):
            lane, row = divmod(layer, self.layers)
            columns = slice(row * self.experts, (row + 1) * self.experts)
            found.append((slice(lane, lane + 1), columns, layer * self.experts))
        return found

    def distances(self) -> Ints:
        """Layers to go from each layer of a lane to each column's: 0 to its own, int64 [layers, width].

        Past the last layer comes the first one of the next forward pass.
        """
        layers = np.arange(self.layers)
        return ((layers - layers[:, None]) % self.num_layers).repeat(self.experts, axis=1)

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """A state array [count, width] that has `values` [num_layers, experts] for every copy of the model."""
        copies = self.count * self.layers // self.num_layers
        return np.tile(values.reshape(-1), copies).reshape(self.count, self.width)


class Touch:
    """The experts that one layer's event uses, in each of the N lanes that `lanes` selects.

    An event of fewer than K experts repeats its first one in front, which assignments and `+=` by index do not notice.
    """

    __slots__ = (
        "_decode",
        "_experts",
        "_tokens",
        "_weights",
        "at",
        "columns",
        "lanes",
        "new_pass",
        "new_sequence",
        "scores",
        "sizes",
        "time",
    )

    def __init__(
        self,
        lanes: slice,
        columns: slice,
        at: Ints,
        experts: Any,
        weights: Any,
        tokens: Any,
        decode: Any,
        *,
        sizes: Ints | None = None,
        scores: NDArray[np.float32] | None = None,
        new_pass: bool = True,
        new_sequence: bool = False,
        time: int = 0,
    ) -> None:
        self.lanes = lanes
        self.columns = columns
        """Where the layer's experts lie in a lane."""
        self.at = at
        """[N, K]: the members as flat indices into arrays of shape [all lanes, width]."""
        self._experts = experts
        self._weights = weights
        self._tokens = tokens
        self._decode = decode
        self.sizes = sizes
        """[N]: how many members each event has; None if K."""
        self.scores = scores
        """float32 [N, experts]: the router's logits, averaged over the event's tokens; None if they are not known."""
        self.new_pass = new_pass
        """Whether a forward pass begins with this event."""
        self.new_sequence = new_sequence
        """Whether a sequence begins with it."""
        self.time = time
        """Its place in the `Future`, for rules that know what comes next."""

    @property
    def experts(self) -> Ints:
        """[N, K]: expert indices in touch order, that is by ascending total router weight."""
        return _rows(self._experts)

    @property
    def weights(self) -> Floats:
        """[N, K]: the members' total router weights."""
        return _rows(self._weights)

    @property
    def tokens(self) -> Ints:
        """[N, K]: how many tokens chose each member."""
        return _rows(self._tokens)

    def shares(self) -> Floats:
        """[N, K]: each member's part of its event's total weight; the weights themselves where all are 0."""
        if isinstance(self._weights, tuple):  # one event: a few additions take less time than a call of NumPy
            total = self._sums_above()[0] or 1.0
            return np.array(([weight / total for weight in self._weights],))
        shares: Floats = self.weights / self._totals(self._sums())
        return shares

    def shares_above(self) -> Floats:
        """[N, K]: what part of its event's total weight those of higher weight, touched after it, have."""
        if isinstance(self._weights, tuple):
            total, *heavier = self._sums_above()
            return np.array(([weight / (total or 1.0) for weight in heavier],))
        sums = self._sums()
        above = np.zeros_like(sums)
        np.divide(sums[:, :-1], self._totals(sums), out=above[:, -2::-1])
        return above

    def _sums_above(self) -> list[float]:
        """Of one event: the total weight, then the weight above each member. The highest are added first."""
        # Not `sum`, which newer Pythons round otherwise.
        return [*accumulate(reversed(self._weights), initial=0.0)][::-1]

    def _sums(self) -> Floats:
        """[N, K]: weights summed from the highest down. Members repeated come last and change nothing before them."""
        return self.weights[:, ::-1].cumsum(axis=1)

    def _totals(self, sums: Floats) -> Floats:
        """[N, 1]: the total weight of every event; 1 where it is 0."""
        totals = sums[:, -1] if self.sizes is None else sums[np.arange(len(sums)), self.sizes - 1]
        return np.where(totals == 0, 1, totals)[:, None]

    def probabilities(self) -> Floats:
        """[N, experts]: the softmax of `scores`; without them, the members' `shares`, and 0 for all other experts."""
        if self.scores is None:
            dense = np.zeros((len(self.at), self.columns.stop - self.columns.start))
            dense[np.arange(len(dense))[:, None], self.experts] = self.shares()
            return dense
        # Of minus infinity alone, as a mean over tokens may be, there is no softmax: then all are 0.
        exp: Floats = np.exp(self.scores - self.scores.max(axis=1, keepdims=True, initial=-1e38))
        exp /= exp.sum(axis=1, keepdims=True, initial=1e-38)
        return exp

    @property
    def decode(self) -> NDArray[np.bool_]:
        """[N]: whether the event continues sequences; else it reads a prompt."""
        return np.atleast_1d(self._decode)

    @classmethod
    def of(cls, event: RoutingEvent, lanes: Lanes, *, new_pass: bool, new_sequence: bool, time: int) -> Touch:
        """One live event: N is 1."""
        lane, columns, first = lanes.places[event.layer]
        return cls(
            lane,
            columns,
            np.array(([first + expert for expert in event.experts],)),
            event.experts,
            event.weights,
            event.tokens,
            event.phase is Phase.DECODE,
            scores=None if event.scores is None else event.scores[None],
            new_pass=new_pass,
            new_sequence=new_sequence,
            time=time,
        )


def _rows(values: Any) -> NDArray[Any]:
    """[N, K]; of one live event, whose values are a tuple, [1, K]."""
    return np.array((values,)) if isinstance(values, tuple) else values


class Future(ABC):
    """What a replay knows beforehand: every event of a run, by `Touch.time`. Rules that ask for it are not causal."""

    times: int
    """How many events there are, one after the other."""

    times_per_pass: int
    """How many of them a forward pass takes: 1 where all layers, each in a lane of its own, are touched at once."""

    @abstractmethod
    def at(self, time: int) -> Ints:
        """The members of the event at `time`, as `Touch.at`: int64 [N, K]."""
