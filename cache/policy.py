"""What an eviction policy is, and how to find one by name.

A policy ranks experts; `cache.residency.ExpertCache` decides which of them may go and how many must. A policy sees
every routing event, whatever the cache holds, and knows neither bytes nor devices nor wall time: the same events give
the same ranking, live and replayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cache.errors import PolicyError
from cache.lanes import Future, Ints, Lanes, Touch
from cache.registry import Part, Registry
from cache.selection import weakest_first
from cache.types import RoutingEvent

if TYPE_CHECKING:
    from cache.traces.trace import Trace


class EvictionPolicy(Part, ABC):
    """Which expert is worth the least.

    A policy is written once, for any number of caches ("lanes") at a time: its state are arrays [lanes, width], and an
    event touches the same layer in many of them. One of one's own needs `priorities`; for more state than below, also
    `reset` and `touch`. For one event the caller looks every member up, then calls `touch`, then asks for priorities.
    Equal priorities go least recently used first, then lowest `(layer, expert)` first: no two experts ever tie.

    Every policy has the state that most rules are made of, int64 [lanes, width], 0 for an expert that was never used:
    `uses`, the number of events that used it; `recency`, the position of its last use among all uses so far, from 1;
    `last_step`, the forward pass of its last use, from 1. And `step`, the number of forward passes begun. A prompt's
    event is one use, whatever its number of tokens; eviction forgets nothing.
    """

    causal: ClassVar[bool] = True
    """Whether it can run live: it does not ask for the future."""

    bypass: bool = False
    """Whether a missing expert is admitted only if it outranks what would have to go; else it always is (forced)."""

    sees_cache: ClassVar[bool] = False
    """Whether its state depends on what the cache holds or how much fits; set where a hook below is overridden."""

    learns: ClassVar[bool] = False
    """Whether it needs a profile, a recorded trace."""

    can_learn: ClassVar[bool] = False
    """Whether it makes use of a profile if there is one; set where `learn` is overridden."""

    uses_scores: ClassVar[bool] = False
    """Whether it reads the router's scores of all experts. Without them it falls back to the chosen ones' weights."""

    exchanges: ClassVar[bool] = False
    """Whether it brings experts in that nobody is waiting for: see `exchange`."""

    steady: ClassVar[bool] = False
    """Whether a miss changes nothing in a full cache that the policy has had time to fill: what gives up its place to
    anything else may not come back."""

    uses: Ints
    recency: Ints
    last_step: Ints
    step: int

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        hooks = ("on_insert", "on_evict")
        cls.sees_cache |= any(getattr(cls, hook) is not getattr(EvictionPolicy, hook) for hook in hooks)
        cls.can_learn = cls.learn is not EvictionPolicy.learn

    def __init__(self, lanes: Lanes, params: Any = None) -> None:
        super().__init__(lanes.num_layers, lanes.experts, params)
        self.lanes = lanes
        self.reset()

    def zeros(self, dtype: type[Any] = np.float64) -> NDArray[Any]:
        """A state array [lanes, width]."""
        return np.zeros((self.lanes.count, self.lanes.width), dtype)

    def reset(self) -> None:
        """Forget everything, as before the first event; what was learnt from a profile stays.

        Subclasses call this, then create their own state.
        """
        self.uses, self.recency, self.last_step = (self.zeros(np.int64) for _ in range(3))
        self._flat = [array.reshape(-1) for array in (self.uses, self.recency, self.last_step)]
        self.step = 0
        self._clock = 0
        self._pass: tuple[int, int] | None = None
        self._time = -1

    def learn(self, profile: Trace) -> None:
        """Take from a recorded trace what the rule can know beforehand. Called at most once, before the first event."""

    def foresee(self, future: Future) -> None:
        """Take note of everything that will happen. Called after every `reset` of a policy that is not causal."""

    def touch(self, touch: Touch) -> None:
        """Take note that experts were used. Subclasses call this first."""
        if touch.new_pass:
            self.step += 1
        at = touch.at
        uses, recency, last_step = self._flat
        clock = self._clock
        self._clock += at.shape[1]
        uses[at] += 1
        recency.put(at, np.arange(clock + 1, self._clock + 1))  # to every lane the same
        last_step[at] = self.step

    def on_event(self, event: RoutingEvent) -> None:
        """`touch` for one event of one model, as it happens live.

        The policy's running cost, with one call of `priorities`: meant to stay below 10 microseconds for 8 of 128
        experts.
        """
        # Passes are counted, not read from `event.step`, which begins anew with every sequence.
        now = event.sequence, event.step
        before, self._pass = self._pass, now
        self._time += 1
        if event.experts:
            new_sequence = before is None or before[0] != now[0]
            self.touch(Touch.of(event, self.lanes, new_pass=before != now, new_sequence=new_sequence, time=self._time))
        elif before != now:
            self.step += 1

    def on_insert(self, at: Ints) -> None:
        """The cache made room for these experts, flat indices int64 [n], one a lane, on demand or ahead of use."""

    def on_evict(self, at: Ints) -> None:
        """The cache has no longer room for these experts, flat indices int64 [n], one a lane."""

    def exchange(self) -> list[tuple[Ints, Ints]]:
        """What should come and what go for it when the event touched last is over, for policies that do so: flat
        indices int64 [n], one a lane. Whoever carries it out calls the hooks above. No side effect."""
        return []

    def resize(self, slots: Ints) -> None:
        """The lanes have room for so many experts from now on, int64 [lanes]; what has to go for that has gone.

        Subclasses call this, then work out anew what depends on `lanes.slots`.
        """
        self.lanes = replace(self.lanes, slots=slots)

    @abstractmethod
    def priorities(self, lanes: slice) -> NDArray[Any]:
        """How much each expert is worth keeping, [lanes in the slice, width]: the lowest go first."""

    def eviction_order(self, candidates: NDArray[np.bool_], lane: int) -> Iterator[int]:
        """The columns of `lane` marked in `candidates` [width], in eviction order, lazily.

        The policy must not change meanwhile. Raises PolicyError if `priorities` returned a wrong shape or a NaN.
        """
        values = self.checked_priorities(slice(lane, lane + 1))
        return weakest_first(values[0], self.recency[lane], candidates)

    def checked_priorities(self, lanes: slice) -> NDArray[Any]:
        """`priorities`, or PolicyError for a wrong shape: a user's own policy may return anything."""
        values = self.priorities(lanes)
        shape = lanes.stop - lanes.start, self.lanes.width
        if values.shape != shape:
            raise PolicyError(
                f'eviction policy "{self.name}" gave priorities of shape {values.shape}, not {shape}: fix it'
            )
        return values


_registry: Registry[EvictionPolicy] = Registry("eviction policy", EvictionPolicy, ["cache.policies"])  # type: ignore[type-abstract]
register = _registry.register
names = _registry.names
find_policy = _registry.find


def make_policy(spec: str, lanes: Lanes, profile: Trace | None = None) -> EvictionPolicy:
    """The policy that `spec` names, such as "lru", "lfu(reset=True)" or "my_module:MyPolicy", for `lanes`.

    Raises PolicyError as `Registry.make` does, and for a policy that needs a profile and gets none; TraceError for
    the profile of another model.
    """
    policy = _registry.make(spec, lanes)
    if profile is None and policy.learns:
        raise PolicyError(f'eviction policy "{policy.name}" learns from a recorded trace: name one with --profile')
    if profile is not None and policy.can_learn:
        profile.check_model(lanes.num_layers, lanes.experts)
        policy.learn(profile)
        policy.reset()
    return policy
