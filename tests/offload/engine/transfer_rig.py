"""The runtime, its transfers and a device, over a store whose experts are easily told apart: all but the model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import by_hand
import tiny
import torch

from cache.types import ExpertKey, Tier
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.checkpoint.parameter import ExpertParameter
from offload.decide.manager import Manager
from offload.decide.stacks import Stacks
from offload.device.arena import Slots
from offload.device.base import CpuDevice, Device
from offload.device.emulated import EmulatedDevice
from offload.engine.runtime import ExpertRuntime
from offload.engine.transfer import READERS, TransferEngine

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


def random_events(seed: int, count: int) -> list[tuple[int, list[int]]]:
    """(layer, experts), some events of one expert and some of all."""
    rng = random.Random(seed)
    return [(rng.randrange(LAYERS), rng.sample(range(EXPERTS), rng.randint(1, EXPERTS))) for _ in range(count)]
