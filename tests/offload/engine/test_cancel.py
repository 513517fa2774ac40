"""A prefetch of which a chunk has crossed the link is not taken back: the rest of it comes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny
import torch

from cache.types import ExpertKey, Tier
from offload.decide.plan import Fetch
from offload.device.arena import Slots
from offload.device.emulated import EmulatedDevice
from offload.engine.transfer import READERS, TransferEngine

SLOT = 256
AHEAD, NEEDED = ExpertKey(0, 1), ExpertKey(0, 2)


class Gated(EmulatedDevice):
    """Says when a copy has `begun`, and then waits for a `go`."""

    def __init__(self) -> None:
        super().__init__(1e9)
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> None:
        self.begun.release()
        assert self.go.acquire(timeout=10)
        super().copy(destination, source, after)


def test_what_has_crossed_in_part_is_not_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.engine.link.CHUNK_BYTES", SLOT // 4)
    store, device = tiny.FakeStore(), Gated()
    engine = TransferEngine(
        store,  # type: ignore[arg-type]
        device,
        {Tier.GPU: [Slots(device.allocate(2, SLOT))], Tier.CPU: [Slots(device.host_slots(2, SLOT))]},
        [device.host_slots(READERS, SLOT)],
        [device.allocate(READERS, SLOT)],
    )
    for key in (AHEAD, NEEDED):
        engine.load(key, 0, store)  # type: ignore[arg-type]
    ahead = Fetch(AHEAD, Tier.CPU, (Tier.GPU,))
    engine.prefetch([ahead])
    assert device.begun.acquire(timeout=10)
    engine.submit([Fetch(NEEDED, Tier.CPU, (Tier.GPU,))])
    device.go.release()
    assert device.begun.acquire(timeout=10)  # what is needed is under way, and three chunks wait behind it
    assert not engine.cancel(ahead)
    device.go.release(4)
    assert all(transfer.error is None for transfer in engine.settled())
    for key in (AHEAD, NEEDED):
        assert (engine.slot(Tier.GPU, key) == tiny.FakeStore.mark(key)).all()
    engine.close()
