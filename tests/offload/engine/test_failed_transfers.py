"""Readers and links that fail, and events that are given up: one error, and every slot is free again."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import tiny
import torch
from transfer_rig import EXPERTS, K, Overlapping, Rig, random_events

from cache.errors import TransferError
from cache.types import Tier
from offload.device.base import CpuDevice
from offload.device.emulated import EmulatedDevice

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


@pytest.mark.parametrize("error", [TransferError("the disk is gone"), OSError(5, "bad"), MemoryError(), SystemExit(3)])
def test_a_failing_reader_is_one_error_and_leaves_no_trace(rig: Rig, error: BaseException) -> None:
    rig.event(0, [0, 1])
    rig.store.broken = {K(1, 2): error, K(1, 5): error}
    rng = random.Random(3)
    rig.store.delay_s = lambda key: rng.choice([0.0, 0.001])
    message = "the disk is gone" if isinstance(error, TransferError) else r"moving expert \(1, [25]\) failed"
    for _ in range(3):
        with pytest.raises(TransferError, match=message):
            rig.event(1, list(range(EXPERTS)))
        rig.check_idle()
    rig.store.broken = {}
    for layer, experts in random_events(4, 20):
        rig.event(layer, experts)
    rig.event(1, list(range(EXPERTS)))


def test_a_failing_link_is_one_error_and_leaves_no_trace() -> None:
    class Flaky(EmulatedDevice):
        broken = False

        def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> None:
            if self.broken and int(source[0]) == tiny.FakeStore.mark(K(2, 3)):
                raise RuntimeError("the link is down")
            super().copy(destination, source, after)

    for slots in ({Tier.GPU: 0, Tier.CPU: 0}, {Tier.GPU: 3, Tier.CPU: 2}, {Tier.GPU: 1, Tier.CPU: 24}):
        rig = Rig(tiny.FakeStore(), Flaky(1e9), slots)
        rig.event(2, [3, 4])  # with much RAM, the expert comes from there the next time
        rig.event(0, [0, 1, 2, 3, 4])
        rig.device.broken = True  # type: ignore[attr-defined]
        for _ in range(3):
            with pytest.raises(TransferError, match=r"moving expert \(2, 3\) failed: RuntimeError: the link is down"):
                rig.event(2, list(range(EXPERTS)))
            rig.check_idle()
        rig.device.broken = False  # type: ignore[attr-defined]
        rig.event(2, list(range(EXPERTS)))
        rig.check_idle()
        rig.close()


def test_a_link_that_fails_at_the_end_of_a_copy_leaves_no_trace() -> None:
    for slots in ({Tier.GPU: 0, Tier.CPU: 0}, {Tier.GPU: 3, Tier.CPU: 24}, {Tier.GPU: 8, Tier.CPU: 0}):
        device = Overlapping()
        rig = Rig(tiny.FakeStore(), device, slots)
        rig.event(0, [0, 1, 2, 3, 4])
        device.broken = tiny.FakeStore.mark(K(2, 3))
        for _ in range(3):
            with pytest.raises(TransferError, match=r"moving expert \(2, 3\) failed: RuntimeError: the link is down"):
                rig.event(2, list(range(EXPERTS)))
            rig.check_idle()
        device.broken = None
        rig.event(2, list(range(EXPERTS)))
        rig.check_idle()
        rig.close()


def test_an_event_given_up_midway_leaves_no_trace(rig: Rig) -> None:
    rig.store.delay_s = lambda key: 0.001
    for taken in range(EXPERTS):
        with pytest.raises(ZeroDivisionError), rig.run(0, list(range(EXPERTS))) as available:
            for count, _ in enumerate(available):
                if count == taken:
                    raise ZeroDivisionError
        rig.check_idle()
        rig.event(1, [taken])


def test_what_failed_to_start_leaves_no_trace() -> None:
    """An error of the policy reaches the caller, and the next event works."""
    rig = Rig(tiny.FakeStore(), CpuDevice(), {Tier.CPU: 3})
    rig.event(0, [0, 1])
    choose = rig.caches[0].policy.priorities
    rig.caches[0].policy.priorities = lambda lanes: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        rig.event(0, [1, 2, 3])
    rig.caches[0].policy.priorities = choose  # type: ignore[method-assign]
    rig.check_idle()
    rig.event(0, [1, 2, 3])
    rig.close()


def test_no_reader_writes_to_a_slot_that_was_given_back() -> None:
    """When one part of an expert fails at once, its slot is free only after the slow reader of the other part."""
    rig = Rig(tiny.FakeStore(parts=2), CpuDevice(), {Tier.CPU: 1})
    rig.store.broken = {K(0, 0): TransferError("half of it is gone")}
    rig.store.delay_s = lambda key: 0.05 if key == K(0, 0) else 0.0
    for _ in range(3):
        with pytest.raises(TransferError, match="half"):
            rig.event(0, [0])
        rig.event(1, [5])
        time.sleep(0.06)  # whoever is late writes now
        rig.check_idle()
        rig.event(2, [6])
    rig.close()
