"""Members of one event at several precisions: each comes with its own precision's slices, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import by_hand
import pytest
import tiny
import torch

from cache.types import ExpertKey, RoutingEvent, Tier
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.checkpoint.parameter import ExpertParameter
from offload.decide.fallbacks.base import Candidate, Choice, Fallback
from offload.decide.manager import Manager
from offload.decide.stacks import Stacks
from offload.device.arena import Slots
from offload.device.base import CpuDevice
from offload.engine.runtime import ExpertRuntime
from offload.engine.transfer import READERS, TransferEngine
from offload.store.base import Precision

SLOT = 256


class Upper(tiny.FakeStore):
    """The slices that the better precision has beside those of the lower one."""

    @staticmethod
    def mark(key: ExpertKey) -> int:
        return tiny.FakeStore.mark(key) + 100


class Nested(tiny.FakeStore):
    """Of every expert a lower and an upper slice; the better precision takes both."""

    def __init__(self) -> None:
        super().__init__()
        self.slices = [self, Upper()]
        self.slot_bytes = [SLOT, SLOT]
        self.precisions = [Precision("both", (0, 1)), Precision("lower", (0,))]

    def weights(self, layer: int, precision: int, slots: Sequence[torch.Tensor]) -> dict[str, Any]:
        """What it was asked for, and the marks of what lies there."""
        return {"precision": precision, "marks": [int(slot[0]) for slot in slots]}


class OddOnesLower(Fallback):
    """Experts of odd numbers are served at the lower precision."""

    def choose(self, event: RoutingEvent, candidates: Sequence[Candidate], spare_s: float) -> list[Choice]:
        return [Choice(c.key.expert % 2) for c in candidates]


@pytest.fixture
def runtime() -> Iterator[ExpertRuntime]:
    store, device = Nested(), CpuDevice()
    engine = TransferEngine(
        store,  # type: ignore[arg-type]
        device,
        {Tier.CPU: [Slots(device.host_slots(4, SLOT)) for _ in range(2)]},
        [device.host_slots(READERS, SLOT) for _ in range(2)],
    )
    stacks = Stacks([[by_hand.cache_of(Tier.CPU, 4, SLOT, 1, 8)] for _ in range(2)], [SLOT, SLOT], [(0, 1), (0,)])
    manager = Manager(stacks, fallback=OddOnesLower(1, 8, 2))
    whole = ExpertParameter("slot", "experts.slot", (SLOT,), torch.uint8, 0, 0, (), None)
    layers = (ExpertLayer(0, "layers.0", 8, (whole,), None),)
    yield ExpertRuntime(ExpertMap(layers, {}), store, manager, engine)  # type: ignore[arg-type]
    engine.close()


def test_each_member_has_the_slices_of_its_precision(runtime: ExpertRuntime) -> None:
    layer = runtime._layers[0]
    for together, expected in ((1, 4), (1, 4), (2, 2), (4, 2)):  # fetched, then resident, at last some in one group
        groups = list(runtime.run(layer, [0, 1, 2, 3], [1.0] * 4, [1] * 4, together=together))
        assert len(groups) == expected
        for expert, weights in (member for group in groups for member in group):
            key = ExpertKey(0, expert)
            both = [tiny.FakeStore.mark(key), Upper.mark(key)]
            assert weights == {"precision": expert % 2, "marks": both[: 2 - expert % 2]}
