"""What an eviction policy is, and how to find one by name.

A policy ranks experts; `cache.residency.ExpertCache` decides which of them may go and how many must. A policy
sees every routing event, whatever the cache holds, and knows neither bytes nor devices nor wall time: the
same events give the same ranking, live and replayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import PolicyError
from cache.registry import Part, Registry
from cache.types import ExpertKey, RoutingEvent


class EvictionPolicy(Part, ABC):
    """Which expert is worth the least.

    A policy of one's own needs `priorities`; for more state than below, also `reset` and `on_event`.

    For one event the caller looks every member up, then calls `on_event`, then reserves room for what is
    missing. Equal priorities go least recently used first, then lowest `(layer, expert)` first: no two
    experts ever tie.

    Every policy has the state that most rules are made of. One element per expert, int64 [layers, experts]:
    `uses`, the number of events that used it; `recency`, the position of its last use among all uses so far,
    from 1; `last_step`, the forward pass of its last use, from 1. All are 0 for an expert that was never
    used. And `step`, the number of forward passes begun. A prompt's event is one use, whatever its number of
    tokens; eviction forgets nothing.
    """

    uses: NDArray[np.int64]
    recency: NDArray[np.int64]
    last_step: NDArray[np.int64]
    step: int

    def __init__(self, num_layers: int, num_experts: int, params: Any = None) -> None:
        super().__init__(num_layers, num_experts, params)
        self.reset()

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, experts): the shape of every state array."""
        return self.num_layers, self.num_experts

    def reset(self) -> None:
        """Forget everything, as before the first event. Subclasses call this, then create their own state."""
        self.uses, self.recency, self.last_step = np.zeros((3, *self.shape), np.int64)
        self.step = 0
        self._all_uses = 0
        self._pass: tuple[int, int] | None = None

    def on_event(self, event: RoutingEvent) -> None:
        """Take note that the event's experts were used, in its order. Subclasses call this first.

        The policy's only running cost: meant to stay below 10 microseconds for 8 experts.
        """
        # Passes are counted, not read from `event.step`, which begins anew with every sequence.
        if self._pass != (event.sequence, event.step):
            self._pass = event.sequence, event.step
            self.step += 1
        layer, experts = event.layer, np.array(event.experts, np.intp)
        self.uses[layer][experts] += 1
        self.recency[layer][experts] = np.arange(self._all_uses + 1, self._all_uses + experts.size + 1)
        self.last_step[layer][experts] = self.step
        self._all_uses += experts.size

    def on_insert(self, key: ExpertKey) -> None:
        """The cache reserved room for `key`: on demand or ahead of its use."""

    def on_evict(self, key: ExpertKey) -> None:
        """The cache no longer has room for `key`: it was evicted, or its transfer aborted."""

    @abstractmethod
    def priorities(self, layers: slice) -> NDArray[Any]:
        """How much each expert is worth keeping, [layers in the slice, experts]: the lowest go first."""

    def eviction_order(self, evictable: NDArray[np.bool_], layers: slice) -> Iterator[ExpertKey]:
        """The experts marked in `evictable` [layers in the slice, experts], in eviction order.

        Lazy, since mostly one is wanted: O(candidates) for each expert taken. The policy must not change
        meanwhile. Raises PolicyError if `priorities` returned a wrong shape or a NaN.
        """
        values = self.priorities(layers)
        if values.shape != evictable.shape:
            raise PolicyError(
                f'eviction policy "{self.name}" gave priorities of shape {values.shape}, not {evictable.shape}: fix it'
            )
        candidates = np.flatnonzero(evictable)
        values = values.ravel()[candidates]
        recency = self.recency[layers].ravel()
        first_layer = layers.indices(self.num_layers)[0]
        while candidates.size:
            lowest = values.min()
            if lowest != lowest:
                raise PolicyError(f'eviction policy "{self.name}" gave a priority that is not a number: fix it')
            ties = np.flatnonzero(values == lowest)
            index = ties[recency[candidates[ties]].argmin()] if ties.size > 1 else ties[0]
            layer, expert = divmod(int(candidates[index]), self.num_experts)
            yield ExpertKey(first_layer + layer, expert)
            candidates = np.delete(candidates, index)
            values = np.delete(values, index)


_registry: Registry[EvictionPolicy] = Registry("eviction policy", EvictionPolicy, ["cache.policies"])  # type: ignore[type-abstract]
register = _registry.register
names = _registry.names
find_policy = _registry.find
make_policy = _registry.make
