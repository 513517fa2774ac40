"""The link to an accelerator: copies follow one another without a gap, and overwrite nothing that is still read."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny
import torch
from transfer_rig import K, Overlapping, Rig, random_events

from cache.types import Tier
from offload.decide.plan import Fetch
from offload.device.emulated import EmulatedDevice

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


def test_the_link_takes_the_next_expert_before_the_last_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Overlapping()
    rig = Rig(tiny.FakeStore(), device, {Tier.GPU: 3, Tier.CPU: 8})
    rig.event(0, list(range(8)))
    rig.event(1, [0, 1, 2])  # layer 0 is in host memory, as far as it fits, and nowhere else
    device.order.clear()
    begin, ready = device.begin_copy, threading.Event()

    def when_all_are_there(*args: Any) -> Any:
        ready.wait(10)
        return begin(*args)

    monkeypatch.setattr(device, "begin_copy", when_all_are_there)
    experts = [key.expert for key in rig.caches[1].resident() if key.layer == 0][:3]
    submit = rig.engine.submit

    def submitted(fetches: Any) -> None:
        submit(fetches)
        ready.set()

    monkeypatch.setattr(rig.engine, "submit", submitted)
    came = rig.event(0, experts)
    first, second, third = (tiny.FakeStore.mark(K(0, expert)) for expert in came)
    assert device.order == [("<", first), ("<", second), (">", first), ("<", third), (">", second), (">", third)]
    rig.check_idle()
    rig.close()


def test_chunks_overlap_and_one_that_fails_takes_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.engine.disk.CHUNK_BYTES", 64)
    monkeypatch.setattr("offload.engine.link.CHUNK_BYTES", 64)
    device = Overlapping()
    rig = Rig(tiny.FakeStore(), device, {Tier.GPU: 3, Tier.CPU: 0})
    good, bad = K(0, 1), K(0, 2)
    device.broken = tiny.FakeStore.mark(bad)
    for key in (good, bad):
        rig.engine.prefetch([Fetch(key, Tier.DISK, (Tier.GPU,))])
        (landed,) = rig.engine.settled()
        assert (landed.error is None) == (key is good)
    assert [each for each, _ in device.order[:8]] == ["<", "<", ">", "<", ">", "<", ">", ">"]
    assert (rig.engine.slot(Tier.GPU, good) == tiny.FakeStore.mark(good)).all()
    with pytest.raises(KeyError):
        rig.engine.slot(Tier.GPU, bad)
    rig.close()


class Asynchronous(EmulatedDevice):
    """Work given to the computing stream is done only when a fence after it has been waited for, as on a GPU.

    `used` counts the work given; a copy into memory that unfinished work still reads is remembered in `races`.
    """

    def __init__(self) -> None:
        super().__init__(1e9)
        self.used = 0
        self.readers: dict[int, int] = {}
        self.races: list[int] = []

    def compute_with(self, slot: torch.Tensor) -> None:
        self.used += 1
        self.readers[slot.data_ptr()] = self.used

    def fence(self) -> Any:
        return self.used

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> None:
        if self.readers.get(destination.data_ptr(), 0) > (after or 0):
            self.races.append(destination.data_ptr())
        super().copy(destination, source, after)


@pytest.mark.parametrize("slots", [{Tier.GPU: 0, Tier.CPU: 0}, {Tier.GPU: 2, Tier.CPU: 4}, {Tier.GPU: 6, Tier.CPU: 0}])
def test_no_copy_overwrites_what_given_work_still_reads(slots: dict[Tier, int]) -> None:
    device = Asynchronous()
    rig = Rig(tiny.FakeStore(), device, slots)
    for layer, experts in random_events(5, 40):
        with rig.run(layer, experts) as available:
            for _, slot in available:
                device.compute_with(slot)
    assert device.used > 100 and device.races == []
    rig.check_idle()
    rig.close()
