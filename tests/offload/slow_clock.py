"""A clock that goes as a test says: a machine as slow as the test wants takes no longer to test."""

from __future__ import annotations


class SlowClock:
    """Seconds that pass when something takes them, and next to none when it is looked at."""

    def __init__(self, tick_s: float = 1e-7) -> None:
        self.now_s = 0.0
        self._tick_s = tick_s

    def __call__(self) -> float:
        self.now_s += self._tick_s
        return self.now_s

    def take(self, seconds: float) -> None:
        """Something takes so long."""
        self.now_s += seconds
