"""Whether a machine did other things while it was measured."""

from __future__ import annotations

import os
import time

import psutil

_TOLERATED_CORES = 0.25  # what an idle desktop does
_SAME = 1.5  # two times of one thing on an idle machine differ by less, even where it slows down as it gets warm


class Watch:
    """Counts, from its creation on, how many of the cores that this process may use were used by others."""

    def __init__(self) -> None:
        self._cores = usable()
        self._start = self._now()

    def others(self) -> float | None:
        """How many cores others had on average; None where the system does not say."""
        (wall, busy, own), (wall_before, busy_before, own_before) = self._now(), self._start
        if busy <= busy_before or wall <= wall_before:  # a system that counts nothing
            return None
        return max((busy - busy_before) - (own - own_before), 0.0) / (wall - wall_before)

    def said(self, threads: int) -> str | None:
        """That others were in the way of so many `threads`; None where they were not."""
        others = self.others()
        if others is None or others <= max(len(self._cores) - threads, 0) + _TOLERATED_CORES:
            return None
        return f"other programs used {others:.1f} cores meanwhile"

    def _now(self) -> tuple[float, float, float]:
        cores = psutil.cpu_times(percpu=True)
        busy = sum(_busy_s(core) for i, core in enumerate(cores) if i in self._cores)
        return time.perf_counter(), busy, time.process_time()


def differs(first_s: float, last_s: float) -> str | None:
    """That one thing took another time at the end than at the beginning; None where the times are alike."""
    ratio = last_s / first_s if first_s and last_s else 1.0
    if 1 / _SAME <= ratio <= _SAME:
        return None
    return f"the same product took {ratio:.1f} times as long at the end as at the beginning"


def usable() -> frozenset[int]:
    """The cores that this process may run on, by number."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _busy_s(times: object) -> float:
    """Seconds that a core worked for somebody, or that its virtual machine's host had for itself."""
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(times, kind, 0.0) for kind in kinds)
