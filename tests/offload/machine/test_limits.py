"""Measuring ends in time on a machine of any speed, and keeps what it has when it is stopped.

The machine's products, disk and tiny models take as long as the test says, by a clock of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slow_clock import SlowClock
from tiny import one_thread

from cache.types import Tier
from offload.costs.machine import Curve
from offload.device.base import CpuDevice
from offload.device.emulated import EmulatedDevice
from offload.machine import compute, overhead, tier
from offload.machine.budget import Budget
from offload.machine.busy import Watch
from offload.machine.extent import Extent
from offload.machine.measure import Stopped, measure_machine
from offload.machine.overhead import Overhead

SHAPES = {(64, 32): (1, 8, 128), (128, 64): (1, 2, 8, 32, 128, 512), (256, 128): (1, 8, 128)}
LITTLE = Extent(
    file_bytes=2**22,
    record_bytes=(2**18,),
    disk_blocks=(2**18,),
    experts=SHAPES,
    dense_shape=(128, 128),
    dense_tokens=(1, 8, 32, 128, 512),
    block_bytes=2**20,
    copy_bytes=(2**10, 2**20),
)
COMPUTING = "computing experts and dense layers on"


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    yield from one_thread()


class SlowMachine:
    """Its experts' products take `row_s` for each token, by a weight's share of the largest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, row_s: float, models_s: float = 5.0) -> None:
        self.clock = SlowClock(1e-3)
        self.products = 0
        self.stop_at = -1
        self._row_s, self._models_s = row_s, models_s
        monkeypatch.setattr(compute, "compute_expert", self._product)
        monkeypatch.setattr(tier, "measure_overhead", self._overhead)
        monkeypatch.setattr(
            EmulatedDevice, "copy", lambda device, there, source, after: self.clock.take(1e-9 * len(there))
        )
        monkeypatch.setattr(os, "fsync", lambda descriptor: self.clock.take(0.1))

    def _product(self, module: Any, x: Any, weights: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():  # beside what is measured: that has the clock
            return x
        self.products += 1
        if self.products == self.stop_at:
            raise KeyboardInterrupt
        self.clock.take(self._row_s * max(len(x) / 4, 1.0) * (x.shape[1] / 256) ** 2)
        return x

    def _overhead(self, device: Any, tokens: Any, rounds: int, budget: Budget) -> Overhead:
        self.clock.take(self._models_s)
        return Overhead(Curve((1,), (1e-3,)), 1e-5, 1e-3)


class Model:
    """A tiny model whose passes take `token_s` a token; one token is taken from a reply of 16."""

    def __init__(self, clock: SlowClock, token_s: float) -> None:
        self._clock, self._token_s = clock, token_s

    def pass_s(self, tokens: int) -> float:
        self._clock.take(self._token_s * (16 if tokens == 1 else tokens))
        return self._token_s * tokens


@pytest.mark.parametrize(("token_s", "counts"), [(1e-4, {1: 3, 32: 3, 512: 3}), (4e-3, {1: 3, 32: 3}), (0.1, {1: 1})])
def test_tiny_models_run_as_often_as_there_is_time(token_s: float, counts: dict[int, int]) -> None:
    clock = SlowClock()
    models: Any = [Model(clock, token_s)] * 3
    times = overhead._take(models, (1, 32, 512), 3, Budget(9.0, clock))
    assert {tokens: len(rounds) for tokens, rounds in times.items()} == counts
    assert clock.now_s < 9.0
    assert times[1][0] == [token_s] * 3


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("row_s", [1e-3, 4e-3, 0.4])
def test_it_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_s: float, device: str) -> None:
    machine = SlowMachine(monkeypatch, row_s)
    measured = EmulatedDevice(1e9) if device == "emulated" else CpuDevice()
    profile = measure_machine(tmp_path, measured, 1, LITTLE, limit_s=38.0, clock=machine.clock)
    assert machine.clock.now_s < 43.0
    for each in profile.compute.values():
        usual = {curve.format for curve in each.experts if curve.shape == LITTLE.usual_shape}
        assert usual == set(LITTLE.formats)
        assert {curve.format for curve in each.dense} == set(LITTLE.dense_formats)
        assert all(curve.seconds.at[-1] == SHAPES[curve.shape][-1] for curve in each.experts)
    estimated = any(curve.extrapolated for each in profile.compute.values() for curve in each.experts)
    assert estimated == (row_s > 0.1)
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_is_kept_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped among the products of an emulated accelerator, of which too little is known: the CPU's are whole."""
    machine = SlowMachine(monkeypatch, 1e-3)

    def on_step(step: str) -> None:
        if step == f"{COMPUTING} emulated":
            machine.stop_at = machine.products + 10

    with pytest.raises(Stopped) as stopped:
        measure_machine(tmp_path, EmulatedDevice(1e9), 1, LITTLE, on_step, clock=machine.clock)
    assert stopped.value.step == f"{COMPUTING} emulated"
    profile = stopped.value.profile
    assert profile is not None and profile.link is None and set(profile.compute) == {Tier.CPU}
    assert not any(curve.extrapolated for curve in profile.compute[Tier.CPU].experts)


@pytest.mark.parametrize("where", ["reading from disk", "running tiny models on cpu", f"{COMPUTING} cpu"])
def test_too_little_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    machine = SlowMachine(monkeypatch, 1e-3)

    def on_step(step: str) -> None:
        if step == where:
            raise KeyboardInterrupt

    with pytest.raises(Stopped) as stopped:
        measure_machine(tmp_path, CpuDevice(), 1, LITTLE, on_step, clock=machine.clock)
    assert stopped.value.step == where and stopped.value.profile is None
    assert list(tmp_path.iterdir()) == []


def test_the_profile_says_that_the_machine_was_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SlowMachine(monkeypatch, 2e-2)
    monkeypatch.setattr(Watch, "others", lambda self: 0.0)
    assert measure_machine(tmp_path, CpuDevice(), 1, LITTLE, clock=machine.clock).busy is None

    def slower(step: str) -> None:
        machine._row_s = 2e-2 if step != f"{COMPUTING} cpu" else 4e-2

    busy = measure_machine(tmp_path, CpuDevice(), 1, LITTLE, slower, clock=machine.clock).busy
    assert busy is not None and busy.endswith("times as long at the end as at the beginning")
    monkeypatch.setattr(Watch, "others", lambda self: 64.0)
    busy = measure_machine(tmp_path, CpuDevice(), 1, LITTLE, clock=machine.clock).busy
    assert busy is not None and busy.startswith("other programs used 64.0 cores")
