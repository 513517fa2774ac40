"""The measured pace of passes, and the switch that goes by it."""

from __future__ import annotations

import pytest

from cache.types import Phase, Tier
from offload.decide.pace import Pace, PassTime, Switch


def test_averages_follow_the_latest_passes() -> None:
    pace = Pace()
    pace.update(PassTime(Phase.DECODE, 1.0, 0.2, 0.3, 5, 10, 4, 0.8, 0, 0.0))
    assert pace.expert_s == {Phase.DECODE: pytest.approx(0.02)}
    assert pace.dense_s == {Phase.DECODE: pytest.approx(0.1)}
    assert pace.fetch_s == {Tier.DISK: pytest.approx(0.2)}
    pace.update(PassTime(Phase.DECODE, 1.0, 0.4, 0.3, 5, 10, 4, 0.8, 2, 0.2))
    assert pace.expert_s[Phase.DECODE] == pytest.approx(0.02 + 0.2 * 0.02)
    assert pace.fetch_s[Tier.CPU] == pytest.approx(0.1)


def passes(switch: Switch, count: int, on_s: float, off_s: float) -> list[bool]:
    """Whether it was on during each of so many passes."""
    states = []
    for _ in range(count):
        states.append(switch.on)
        switch.passed(on_s if switch.on else off_s)
    return states


def test_a_trial_takes_turns_and_keeps_what_pays() -> None:
    switch = Switch()
    states = passes(switch, 24, on_s=0.8, off_s=1.0)
    assert states == [True] * 8 + [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4
    assert switch.on and switch.gain == pytest.approx(0.2)
    assert all(passes(switch, 256, 0.8, 1.0))
    assert not switch.on  # the next trial


def test_what_does_not_pay_is_switched_off_until_the_next_trial() -> None:
    switch = Switch()
    passes(switch, 24, on_s=1.1, off_s=1.0)
    assert not switch.on and switch.gain == pytest.approx(-0.1)
    assert not any(passes(switch, 64, 1.1, 1.0))
    passes(switch, 16, on_s=0.9, off_s=1.0)  # by now it does
    assert switch.on


@pytest.mark.parametrize("slow", [10, 14])
@pytest.mark.parametrize("on_s", [0.8, 2.0])
def test_one_slow_pass_decides_nothing(slow: int, on_s: float) -> None:
    switch = Switch()
    for index in range(24):
        switch.passed((on_s if switch.on else 1.0) + 50.0 * (index == slow))
    assert switch.on == (on_s < 1)


@pytest.mark.parametrize(("slower", "stays"), [(0.0, True), (0.04, True), (0.5, False)])
def test_what_such_passes_differ_by_anyway_decides_nothing(slower: float, stays: bool) -> None:
    switch = Switch()
    for index in range(24):
        switch.passed(1.0 + 0.1 * (index % 4) + slower * switch.on)
    assert switch.on == stays and switch.gain is not None and (switch.gain < 0) == (slower > 0)
