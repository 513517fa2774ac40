"""Taking times on machines that are also busy with other things."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from offload.costs.machine import Curve


def median_s(action: Callable[[], object], budget_s: float = 0.1) -> float:
    """The median seconds of `action`, run 3 to 50 times, for about `budget_s`, after a run that does not count."""
    action()
    return median_of(lambda: seconds(action), budget_s)


def seconds(action: Callable[[], object]) -> float:
    """How long one run of `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_of(sample: Callable[[], float], budget_s: float) -> float:
    """The median of 3 to 50 samples, as many as `budget_s` has time for."""
    samples: list[float] = []
    end = time.perf_counter() + budget_s
    while len(samples) < 3 or (len(samples) < 50 and time.perf_counter() < end):
        samples.append(sample())
    return median(samples)


def rising(times: dict[int, float]) -> Curve:
    """Measured seconds by size, without what cannot be: more that takes less.

    Other programs only ever add time, so of two such times the smaller one is believed.
    """
    sizes = sorted(times)
    seconds = [min(times[larger] for larger in sizes[i:]) for i in range(len(sizes))]
    return Curve(tuple(sizes), tuple(seconds))
