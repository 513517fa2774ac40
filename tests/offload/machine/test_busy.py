"""What else a machine did is what its cores did beyond this process."""

from __future__ import annotations

import time
from types import SimpleNamespace

import psutil
import pytest

from offload.machine import busy
from offload.machine.busy import Watch, differs


class Machine:
    """Two cores that this process may use, and one that it may not; seconds since the machine's start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.own, self.cores, self.stolen = 0.0, 0.0, [0.0, 0.0, 0.0], 0.0
        monkeypatch.setattr(busy, "usable", lambda: frozenset({0, 1}))
        monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [self._times(i) for i in range(3)])
        monkeypatch.setattr(time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(time, "process_time", lambda: self.own)

    def _times(self, core: int) -> SimpleNamespace:
        return SimpleNamespace(user=self.cores[core], system=0.0, idle=99.0, iowait=5.0, steal=self.stolen)

    def run(self, wall: float, own: float, *cores: float) -> None:
        self.wall, self.own = self.wall + wall, self.own + own
        self.cores = [before + more for before, more in zip(self.cores, cores, strict=True)]


def test_others_are_what_this_process_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    watch = Watch()
    machine.run(10.0, 15.0, 8.0, 7.5, 10.0)
    assert watch.others() == pytest.approx(0.05)
    assert watch.said(2) is None
    machine.run(10.0, 5.0, 9.0, 9.0, 10.0)
    assert watch.said(2) == "other programs used 0.7 cores meanwhile"
    assert watch.said(1) is None  # the other core was theirs
    machine.stolen = 8.0
    assert watch.said(1) == "other programs used 1.5 cores meanwhile"


def test_a_system_that_counts_nothing_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    watch = Watch()
    machine.run(10.0, 5.0, 0.0, 0.0, 0.0)
    assert watch.others() is None and watch.said(2) is None


def test_cores_are_there() -> None:
    assert busy.usable()
    assert (Watch().others() or 0.0) >= 0.0


def test_two_times_of_one_thing_are_alike_on_an_idle_machine() -> None:
    assert differs(1.0, 1.4) is None and differs(1.4, 1.0) is None and differs(0.0, 1.0) is None
    assert differs(1.0, 1.8) == "the same product took 1.8 times as long at the end as at the beginning"
    assert "0.5 times" in (differs(1.0, 0.5) or "")
