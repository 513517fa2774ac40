"""How long measuring may take, and times taken within that.

A part of the work ends at a share of the whole time, so what it leaves over goes to the parts after it. What would not
fit is not begun, since nothing that runs can be cut short.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from statistics import median

Clock = Callable[[], float]

_SHARE = 8  # no measurement takes more than this part of what is left: others wait for their turn
_MOST_SAMPLES = 50
_LEAST_SAMPLES = 3


class Budget:
    """So many seconds from now on, by a clock."""

    def __init__(self, seconds: float, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self._start_s = clock()
        self._seconds = seconds

    @property
    def left_s(self) -> float:
        """What is left of it, at least 0."""
        return max(self._start_s + self._seconds - self.clock(), 0.0)

    def until(self, share: float, least_s: float = 1.0) -> Budget:
        """What is left until that share of the whole has passed. A part that comes late still has `least_s`."""
        spent_s = self.clock() - self._start_s
        return Budget(max(share * self._seconds - spent_s, least_s), self.clock)

    def fits(self, seconds: float) -> bool:
        """Whether a run that may take so long leaves enough for what comes after it."""
        return seconds <= self.left_s / _SHARE

    def seconds(self, action: Callable[[], object]) -> float:
        """How long one run of `action` takes."""
        start = self.clock()
        action()
        return self.clock() - start

    def median_s(self, action: Callable[[], object], most_s: float, expected_s: float = 0.0) -> float:
        """The median seconds of `action`, run for about `most_s`, after a run that does not count.

        Where one run takes that long, it is the only one: beside its time, what is cold at first is little. But a run
        of more than `expected_s` may have been held up, and is not believed if there is time for another.
        """
        first_s = self.seconds(action)
        if first_s < self.patience_s(most_s):
            return self.median_of(lambda: self.seconds(action), most_s)
        if first_s <= expected_s or first_s > self.left_s / 2:
            return first_s
        return min(first_s, self.median_of(lambda: self.seconds(action), most_s))

    def median_of(self, sample: Callable[[], float], most_s: float) -> float:
        """The median of up to 50 samples, as many as `most_s` has time for: at least 3, or 1 that takes all of it."""
        end = self.clock() + self.patience_s(most_s)
        samples = [sample()]
        least = _LEAST_SAMPLES if self.clock() < end else 1
        while len(samples) < least or (len(samples) < _MOST_SAMPLES and self.clock() < end):
            samples.append(sample())
        return median(samples)

    def patience_s(self, most_s: float) -> float:
        """How long one thing may be repeated: `most_s`, or less where little is left."""
        return min(most_s, self.left_s / _SHARE)


UNLIMITED = Budget(inf)
