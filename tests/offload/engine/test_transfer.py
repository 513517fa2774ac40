"""Whatever readers, link and policy do, the computing thread gets every expert's right bytes, once, or one error."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import by_hand
import pytest
import tiny
import torch

from cache.errors import TransferError
from cache.types import ExpertKey, Tier
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.checkpoint.parameter import ExpertParameter
from offload.decide.manager import Manager
from offload.decide.plan import Fetch
from offload.decide.stacks import Stacks
from offload.device.arena import Slots
from offload.device.base import CpuDevice, Device
from offload.device.emulated import EmulatedDevice
from offload.engine.runtime import ExpertRuntime
from offload.engine.transfer import READERS, Transfer, TransferEngine
from offload.store.plain import CheckpointReader

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

LAYERS, EXPERTS, SLOT = 3, 8, 256
K = ExpertKey


class Rig:
    """A runtime over a `FakeStore`: everything but the model."""

    def __init__(
        self,
        store: tiny.FakeStore,
        device: Device,
        slots: dict[Tier, int],
        policy: str = "lru",
        readers: int = READERS,
    ) -> None:
        self.store, self.device = store, device
        self.slots = {
            tier: Slots((device.allocate if tier is device.tier else device.host_slots)(count, SLOT))
            for tier, count in slots.items()
        }
        self.caches = [by_hand.cache_of(tier, n, SLOT, LAYERS, EXPERTS, policy) for tier, n in slots.items()]
        self.engine = TransferEngine(
            store,  # type: ignore[arg-type]
            device,
            {tier: [slots] for tier, slots in self.slots.items()},
            [device.host_slots(READERS, SLOT)],
            [device.allocate(READERS, SLOT)] if device.is_accelerator else [],
            readers,
        )
        whole = ExpertParameter("slot", "experts.slot", (SLOT,), torch.uint8, 0, 0, (), None)
        self.layers = tuple(ExpertLayer(i, f"layers.{i}", EXPERTS, (whole,), None) for i in range(LAYERS))
        self.manager = Manager(Stacks.single(self.caches, SLOT))
        self.runtime = ExpertRuntime(ExpertMap(self.layers, {}), store, self.manager, self.engine)  # type: ignore[arg-type]

    @contextmanager
    def run(self, layer: int, experts: list[int]) -> Iterator[Iterator[tuple[int, torch.Tensor]]]:
        """One event: (expert, its slot) as they come."""
        ones = [1] * len(experts)
        with closing(self.runtime.run(self.layers[layer], experts, [1.0] * len(experts), ones)) as available:
            yield ((expert, weights["slot"]) for group in available for expert, weights in group)

    def event(self, layer: int, experts: list[int]) -> list[int]:
        """Runs one event; returns the experts in the order in which they came, each with its own bytes."""
        came = []
        with self.run(layer, experts) as available:
            for expert, slot in available:
                assert (slot == tiny.FakeStore.mark(K(layer, expert))).all(), f"wrong bytes for {layer}, {expert}"
                came.append(expert)
        assert sorted(came) == sorted(experts)
        return came

    def check_idle(self) -> None:
        """Nothing is pinned, pending or lost: every slot is free or holds a resident expert's bytes."""
        self.manager.check_integrity()
        assert list(self.engine.landed()) == []
        for cache in self.caches:
            slots, free = self.slots[cache.tier], []
            while True:
                try:
                    free.append(slots.take())
                except RuntimeError:
                    break
            for slot in free:
                slots.give(slot)
            resident = [self.engine.slot(cache.tier, key) for key in cache.resident()]
            assert len({slot.data_ptr() for slot in free + resident}) == len(free) + len(resident) == slots.count
            for key, slot in zip(cache.resident(), resident, strict=True):
                assert (slot == tiny.FakeStore.mark(key)).all()

    def close(self) -> None:
        self.engine.close()


class Overlapping(EmulatedDevice):
    """Copies begin one before the other has ended, as on a GPU, and bytes are there at the end, not before.

    `order` has what began ("<") and ended (">"), by the first byte; `broken` fails when it ends.
    """

    copies_at_once = 2

    def __init__(self) -> None:
        super().__init__(1e9)
        self.order: list[tuple[str, int]] = []
        self.broken: int | None = None

    def begin_copy(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        self.order.append(("<", int(source[0])))
        destination.fill_(0)
        return destination, source

    def end_copy(self, begun: Any) -> None:
        destination, source = begun
        self.order.append((">", int(source[0])))
        if int(source[0]) == self.broken:
            raise RuntimeError("the link is down")
        self.copy(destination, source, None)


SETUPS: dict[str, tuple[type[Device], dict[Tier, int]]] = {
    "cpu, no room": (CpuDevice, {Tier.CPU: 0}),
    "cpu, three": (CpuDevice, {Tier.CPU: 3}),
    "cpu, all": (CpuDevice, {Tier.CPU: LAYERS * EXPERTS}),
    "emulated, no room": (EmulatedDevice, {Tier.GPU: 0, Tier.CPU: 0}),
    "emulated, one and three": (EmulatedDevice, {Tier.GPU: 1, Tier.CPU: 3}),
    "emulated, none and five": (EmulatedDevice, {Tier.GPU: 0, Tier.CPU: 5}),
    "emulated, five and none": (EmulatedDevice, {Tier.GPU: 5, Tier.CPU: 0}),
    "emulated, seven and twelve": (EmulatedDevice, {Tier.GPU: 7, Tier.CPU: 12}),
    "overlapping, no room": (Overlapping, {Tier.GPU: 0, Tier.CPU: 0}),
    "overlapping, seven and twelve": (Overlapping, {Tier.GPU: 7, Tier.CPU: 12}),
}


def device_of(kind: type[Device]) -> Device:
    return EmulatedDevice(1e9) if kind is EmulatedDevice else kind()


@pytest.fixture(
    params=[(setup, *how) for setup in SETUPS for how in ((1, READERS), (2, READERS), (1, 5), (4, 5))],
    ids=lambda p: f"{p[0]}, parts: {p[1]}, readers: {p[2]}",
)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    setup, parts, readers = request.param
    kind, slots = SETUPS[setup]
    rig = Rig(tiny.FakeStore(parts), device_of(kind), slots, readers=readers)
    yield rig
    rig.check_idle()
    rig.close()


def random_events(seed: int, count: int) -> list[tuple[int, list[int]]]:
    """(layer, experts), some events of one expert and some of all."""
    rng = random.Random(seed)
    return [(rng.randrange(LAYERS), rng.sample(range(EXPERTS), rng.randint(1, EXPERTS))) for _ in range(count)]


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
    monkeypatch.setattr("offload.engine.transfer.CHUNK_BYTES", 64)
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


def test_evicted_slots_are_used_again_and_only_those() -> None:
    rig = Rig(tiny.FakeStore(), CpuDevice(), {Tier.CPU: 2})
    rig.event(0, [0, 1])
    kept, gone = rig.engine.slot(Tier.CPU, K(0, 1)), rig.engine.slot(Tier.CPU, K(0, 0))
    rig.event(0, [1, 2])
    assert rig.engine.slot(Tier.CPU, K(0, 2)) is gone and rig.engine.slot(Tier.CPU, K(0, 1)) is kept
    with pytest.raises(KeyError):
        rig.engine.slot(Tier.CPU, K(0, 0))
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


def test_for_one_token_residents_come_together_and_the_others_as_they_land(rig: Rig) -> None:
    rig.event(1, [0, 1, 2, 3])
    resident = {key.expert for key in rig.manager.computing.resident() if key.layer == 1}
    with closing(rig.runtime.run(rig.layers[1], [3, 5, 1, 0, 2], [1.0] * 5, [1] * 5, together=True)) as available:
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


# The same with a whole model.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("transfer"), "qwen3_moe")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    """What transformers says with all weights in memory: ids [2, 12 + 24]."""
    return tiny.resident(checkpoint).generate(tiny.ids(2, 12), max_new_tokens=24, min_new_tokens=24, do_sample=False)


def generate(model: Any) -> torch.Tensor:
    return model.generate(tiny.ids(2, 12), max_new_tokens=24, min_new_tokens=24, do_sample=False)


@pytest.mark.parametrize("cache", [1, 100_000, 10**9])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_broken_disk_stops_one_reply_and_no_more(
    checkpoint: Path, expected: torch.Tensor, device: str, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CheckpointReader.read
    reads = iter(range(10**9))

    def flaky(self: CheckpointReader, key: ExpertKey, slot: torch.Tensor, *part: int) -> int:
        if next(reads) in broken:
            slot.zero_()
            raise TransferError("injected")
        return read(self, key, slot, *part)

    monkeypatch.setattr(CheckpointReader, "read", flaky)
    broken = {3, 12, 14, 50, 51, 90}  # with room for all, in RAM or beyond, 24 experts are read and no more
    with tiny.open_model(checkpoint, device=device, expert_cache=cache, cpu_mem="8G") as model:
        failures = 0
        while True:
            try:
                tokens = generate(model)
            except TransferError as error:
                assert str(error) == "injected"
                failures += 1
                model.parts.runtime.settle()
                model.parts.runtime.manager.check_integrity()
            else:
                break
        assert failures >= 2
        assert torch.equal(tokens, expected) and torch.equal(generate(model), expected)
        model.parts.runtime.manager.check_integrity()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_delays_change_nothing(
    checkpoint: Path, expected: torch.Tensor, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, rng = CheckpointReader.read, random.Random(11)

    def slow(self: CheckpointReader, key: ExpertKey, slot: torch.Tensor, *part: int) -> int:
        time.sleep(rng.choice([0.0, 0.0, 0.001, 0.004]))
        return read(self, key, slot, *part)

    monkeypatch.setattr(CheckpointReader, "read", slow)
    with tiny.open_model(checkpoint, device=device, expert_cache=5 * 24576) as model:
        assert torch.equal(generate(model), expected)
        stats = model.stats.as_dict()
    assert (
        stats["misses"] > stats["bypasses"] > 0
        and stats["tiers"]["gpu" if device == "emulated" else "cpu"]["evictions"]
    )


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
