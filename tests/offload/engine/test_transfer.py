"""Whatever readers, link and policy do, the computing thread gets every expert's right bytes, once, or one error."""

from __future__ import annotations

import random
import threading
from contextlib import closing

import pytest
import tiny
from transfer_rig import SLOT, K, Rig, random_events

from cache.types import ExpertKey, Tier
from offload.decide.plan import Fetch
from offload.device.arena import Slots
from offload.device.base import CpuDevice
from offload.device.emulated import EmulatedDevice
from offload.engine.transfer import READERS, Transfer, TransferEngine

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


@pytest.mark.parametrize("seed", [0, 1])
def test_any_order_of_arrival_brings_the_right_bytes(rig: Rig, seed: int) -> None:
    rng = random.Random(seed)
    rig.store.delay_s = lambda key: rng.choice([0.0, 0.0, 0.0, 0.0005, 0.002])
    for layer, experts in random_events(seed, 60):
        rig.event(layer, experts)
        rig.check_idle()


def test_residents_come_before_those_that_must_be_fetched() -> None:
    rig = Rig(tiny.FakeStore(), CpuDevice(), {Tier.CPU: 4})
    rig.event(0, [5, 6])
    rig.store.delay_s = lambda key: 0.05  # what lands between two residents would come between them
    assert rig.event(0, [1, 5, 2, 6])[:2] == [5, 6]
    rig.close()


def test_arrivals_do_not_wait_for_slower_ones() -> None:
    rig = Rig(tiny.FakeStore(), CpuDevice(), {Tier.CPU: 4})
    gate = threading.Event()
    slow = K(0, 7)
    rig.store.delay_s = lambda key: 0.0 * gate.wait() if key == slow else 0.0
    came = []
    with rig.run(0, [0, 1, 2, 7]) as available:
        for expert, _ in available:
            came.append(expert)
            if len(came) == 3:
                gate.set()  # the slow one was asked for first, and still the others were all there before it
    assert came[-1] == 7 and rig.store.reads[0] == slow
    rig.close()


def test_experts_of_several_slices_wait_for_no_other() -> None:
    """Slices that lie in RAM overtake what is read first, and still take no place that an earlier expert needs."""
    keys = [K(0, expert) for expert in range(4)]
    in_ram = keys[2:]
    store = tiny.FakeStore()
    store.slices, store.slot_bytes = [store, store], [SLOT, SLOT]
    device = EmulatedDevice(1e9)
    host = [Slots(device.host_slots(count, SLOT)) for count in (2, 0)]
    engine = TransferEngine(
        store,  # type: ignore[arg-type]
        device,
        {Tier.GPU: [Slots([]), Slots([])], Tier.CPU: host},
        [device.host_slots(READERS, SLOT) for _ in range(2)],
        [device.allocate(READERS, SLOT) for _ in range(2)],
    )
    for key in in_ram:
        engine.load(key, 0, store)  # type: ignore[arg-type]
    store.delay_s = lambda key: 0.05
    engine.submit(
        [
            Fetch(key, Tier.CPU if slice_ == 0 and key in in_ram else Tier.DISK, slice=slice_)
            for key in keys
            for slice_ in range(2)
        ]
    )
    served: list[ExpertKey] = []

    def compute() -> None:
        landed: dict[ExpertKey, list[Transfer]] = {}
        for transfer in engine.landed():
            key = transfer.fetch.key
            landed.setdefault(key, []).append(transfer)
            if len(landed[key]) == 2:
                assert all((each.computing_slot == tiny.FakeStore.mark(key)).all() for each in landed[key])
                served.append(key)
                for each in landed[key]:
                    engine.release(each)

    computing = threading.Thread(target=compute, daemon=True)
    computing.start()
    computing.join(10)
    assert not computing.is_alive(), f"only {served} came"
    assert sorted(served) == keys
    engine.close()


def test_stall_is_the_time_spent_waiting() -> None:
    rig = Rig(tiny.FakeStore(), CpuDevice(), {Tier.CPU: 4})
    rig.store.delay_s = lambda key: 0.03
    rig.event(0, [0])
    stalled = rig.engine.stall_s
    assert stalled >= 0.025
    rig.event(0, [0])
    assert rig.engine.stall_s == stalled  # a hit waits for nothing
    rig.close()


def test_evicted_slots_are_used_again_and_only_those() -> None:
    rig = Rig(tiny.FakeStore(), CpuDevice(), {Tier.CPU: 2})
    rig.event(0, [0, 1])
    kept, gone = rig.engine.slot(Tier.CPU, K(0, 1)), rig.engine.slot(Tier.CPU, K(0, 0))
    rig.event(0, [1, 2])
    assert rig.engine.slot(Tier.CPU, K(0, 2)) is gone and rig.engine.slot(Tier.CPU, K(0, 1)) is kept
    with pytest.raises(KeyError):
        rig.engine.slot(Tier.CPU, K(0, 0))
    rig.close()


def test_for_one_token_residents_come_together_and_the_others_as_they_land(rig: Rig) -> None:
    rig.event(1, [0, 1, 2, 3])
    resident = {key.expert for key in rig.manager.computing.resident() if key.layer == 1}
    with closing(rig.runtime.run(rig.layers[1], [3, 5, 1, 0, 2], [1.0] * 5, [1] * 5, together=5)) as available:
        groups = [[expert for expert, _ in group] for group in available]
    assert sorted(expert for group in groups for expert in group) == [0, 1, 2, 3, 5]
    assert [set(group) for group in groups if len(group) > 1] == ([resident] if len(resident) > 1 else [])
    rig.check_idle()


def test_close_ends_the_threads_and_closes_the_readers(rig: Rig) -> None:
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("offload-")]
    assert len(mine) >= READERS + rig.device.is_accelerator
    rig.event(0, [0, 1, 2])
    rig.check_idle()
    other = Rig(rig.store, rig.device, {cache.tier: 1 for cache in rig.caches})
    other.close()
    assert rig.store.closed == READERS
    assert [thread for thread in threading.enumerate() if thread.name.startswith("offload-")] == mine
    other.close()  # twice is fine


def test_workers_start_on_their_own_cores() -> None:
    started: list[str] = []

    class Watched(EmulatedDevice):
        def start_worker(self) -> None:
            started.append(threading.current_thread().name)

    rig = Rig(tiny.FakeStore(), Watched(1e9), {Tier.GPU: 1, Tier.CPU: 1})
    rig.event(0, [0, 1, 2, 3])
    rig.close()
    assert sorted(started) == ["offload-link", "offload-read-0", "offload-read-1"]


def test_only_the_slices_that_are_needed_become_urgent() -> None:
    """What is fetched behind of a better precision does not hold up an event that is served at a lesser one."""
    store = tiny.FakeStore()
    store.slices, store.slot_bytes = [store, store], [SLOT, SLOT]
    device = CpuDevice()
    slots = {Tier.CPU: [Slots(device.host_slots(1, SLOT)) for _ in range(2)]}
    engine = TransferEngine(store, device, slots, [device.host_slots(READERS, SLOT) for _ in range(2)])  # type: ignore[arg-type]
    key = K(0, 1)
    engine.prefetch([Fetch(key, Tier.DISK, (Tier.CPU,), slice=slice_) for slice_ in range(2)])
    engine.await_([(key, 0)])
    landed = list(engine.landed())
    assert [t.fetch.slice for t in landed if t.urgent] == [0]
    assert len(landed) + len(list(engine.settled())) == 2
    engine.close()
