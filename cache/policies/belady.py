"""The optimum for caches that must keep what they fetch."""

from __future__ import annotations

import tempfile
import weakref

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Future, Ints, Lanes, Touch
from cache.policy import EvictionPolicy, register

_IN_MEMORY = 2**28  # bytes
_NEVER = np.iinfo(np.int32).max


@register
class Belady(EvictionPolicy):
    """Evict the expert whose next use is farthest away; offline. The fewest misses that forced admission can have.

    Sources: Belady, "A study of replacement algorithms for a virtual-storage computer", 1966; for events that need
    several experts at once, next uses are counted in events. Bounds every policy of forced admission from above, for
    experts of one size that are fetched on demand.
    """

    name = "belady"
    causal = False

    def reset(self) -> None:
        super().reset()
        self._next_use = np.full((self.lanes.count, self.lanes.width), _NEVER, np.int32)

    def foresee(self, future: Future) -> None:
        self._next_uses = _NextUses(future, self.lanes)

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        self._next_use.reshape(-1)[touch.at] = self._next_uses.at(touch.time).reshape(touch.at.shape)

    def priorities(self, lanes: slice) -> NDArray[np.int32]:
        return -self._next_use[lanes]


class _NextUses:
    """When each member of each event is used next: found last event first, asked for first event first.

    In a temporary file where it is much, so that a long trace takes no more memory than a short one.
    """

    def __init__(self, future: Future, lanes: Lanes) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._ends: Ints = np.zeros(future.times + 1, np.int64)
        following = np.full(lanes.count * lanes.width, _NEVER, np.int32)
        for time in reversed(range(future.times)):
            at = future.at(time)
            self._ends[time] = self._ends[time + 1] + self._file.write(following[at].tobytes())
            following[at] = time

    def at(self, time: int) -> NDArray[np.int32]:
        """The times of the next uses of the members of the event at `time`, int32, in their order."""
        start, end = int(self._ends[time + 1]), int(self._ends[time])
        self._file.seek(start)
        return np.frombuffer(self._file.read(end - start), np.int32)
