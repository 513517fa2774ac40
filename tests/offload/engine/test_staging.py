"""Places on the accelerator for experts of several slices: whole, in order, and free again whatever happens."""

from __future__ import annotations

import threading

import tiny

from cache.errors import TransferError
from cache.types import ExpertKey, Tier
from offload.decide.plan import Fetch
from offload.device.arena import Slots
from offload.device.emulated import EmulatedDevice
from offload.engine.journey import Transfer
from offload.engine.staging import DeviceStaging
from offload.engine.transfer import READERS, TransferEngine

K = ExpertKey
SLOT = 256


def test_a_place_is_free_when_all_its_slices_are() -> None:
    device = EmulatedDevice(1e9)
    staging = DeviceStaging(device, [device.allocate(1, SLOT) for _ in range(2)])
    first, second = ([Transfer(Fetch(K(0, e), Tier.DISK, slice=s), None) for s in range(2)] for e in range(2))
    for transfer in (*first, *second):
        staging.announce(transfer)
    assert all(staging.stage(transfer) for transfer in first)
    for transfer in first:
        assert not staging.stage(second[0])
        assert transfer.device_staging is not None
        staging.release(transfer.fetch.key, transfer.device_staging)
    assert all(staging.stage(transfer) for transfer in second)


def test_what_failed_waits_for_no_place() -> None:
    """As many experts fail as there are places; those after them come all the same."""
    store, device = tiny.FakeStore(), EmulatedDevice(1e9)
    store.slices, store.slot_bytes = [store, store], [SLOT, SLOT]
    engine = TransferEngine(
        store,  # type: ignore[arg-type]
        device,
        {tier: [Slots([]), Slots([])] for tier in (Tier.GPU, Tier.CPU)},
        [device.host_slots(2 * READERS, SLOT) for _ in range(2)],
        [device.allocate(READERS, SLOT) for _ in range(2)],
    )
    failing, good = [K(0, expert) for expert in range(READERS)], K(1, 0)
    store.broken = {key: TransferError("gone") for key in failing}
    came: list[tuple[ExpertKey, bool]] = []

    def run(keys: list[ExpertKey]) -> None:
        engine.submit([Fetch(key, Tier.DISK, slice=slice_) for key in keys for slice_ in range(2)])
        for transfer in engine.landed():
            came.append((transfer.fetch.key, transfer.error is None))
            engine.release(transfer)

    for keys in (failing, [good]):
        computing = threading.Thread(target=run, args=(keys,), daemon=True)
        computing.start()
        computing.join(10)
        assert not computing.is_alive(), f"only {came} came"
    assert sorted(came) == [(key, False) for key in failing for _ in range(2)] + [(good, True)] * 2
    engine.close()
