"""Times are taken as often as there is time for, and no longer."""

from __future__ import annotations

import pytest
from slow_clock import SlowClock

from offload.machine.budget import Budget


class Action:
    """Takes so many seconds each time, the last of them from then on."""

    def __init__(self, clock: SlowClock, *seconds: float) -> None:
        self.clock, self.seconds, self.runs = clock, list(seconds), 0

    def __call__(self) -> None:
        self.clock.take(self.seconds[min(self.runs, len(self.seconds) - 1)])
        self.runs += 1


def test_what_is_fast_is_repeated_and_what_is_slow_is_not() -> None:
    clock = SlowClock()
    budget = Budget(40.0, clock)
    fast, slow = Action(clock, 0.001), Action(clock, 2.0)
    assert budget.median_s(fast, 0.1) == pytest.approx(0.001, abs=1e-4)
    assert fast.runs == 51
    assert budget.median_s(slow, 0.1, expected_s=3.0) == pytest.approx(2.0, abs=1e-4)
    assert slow.runs == 1
    three = Action(clock, 0.05)
    assert budget.median_s(three, 0.06) == pytest.approx(0.05, abs=1e-4)
    assert three.runs == 4


def test_a_run_that_was_held_up_is_not_believed() -> None:
    clock = SlowClock()
    budget = Budget(40.0, clock)
    assert budget.median_s(Action(clock, 5.0, 0.001), 0.1) == pytest.approx(0.001, abs=1e-4)
    assert budget.median_s(Action(clock, 1.0, 0.9), 0.1) == pytest.approx(0.9, abs=1e-4)
    clock.take(30.0)
    assert budget.median_s(Action(clock, 3.0, 0.001), 0.1) == pytest.approx(3.0, abs=1e-4)  # no time for another


def test_a_part_ends_with_its_share_and_leaves_the_rest_to_the_next() -> None:
    clock = SlowClock()
    budget = Budget(40.0, clock)
    assert budget.until(0.25).left_s == pytest.approx(10.0, abs=1e-3)
    clock.take(4.0)
    assert budget.until(0.25).left_s == pytest.approx(6.0, abs=1e-3)
    clock.take(16.0)
    assert budget.until(0.25).left_s == pytest.approx(1.0, abs=1e-3)  # it is late, and has the least
    assert budget.until(1.0, least_s=4.0).left_s == pytest.approx(20.0, abs=1e-3)
    assert budget.fits(2.4) and not budget.fits(2.6)
    clock.take(30.0)
    assert budget.left_s == 0.0 and not budget.fits(0.1)
