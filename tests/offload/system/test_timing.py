"""Times on machines that are also busy with other things."""

from __future__ import annotations

from offload.costs.machine import Curve
from offload.system.timing import median_of, median_s, rising


def test_times_without_what_cannot_be() -> None:
    assert rising({4: 1.0, 1: 2.0, 8: 3.0}) == Curve((1, 4, 8), (1.0, 1.0, 3.0))
    samples = iter([5.0, 1.0, 3.0])
    assert median_of(lambda: next(samples), budget_s=0.0) == 3.0
    calls = list[int]()
    assert median_s(lambda: calls.append(1), budget_s=0.0) >= 0
    assert len(calls) == 4
