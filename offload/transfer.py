"""The live transfer engine: disk -> host -> accelerator, on threads of its own.

Readers take experts from disk into host slots, one thread feeds the link. The thread that computes submits fetches and
receives them as they land; decisions stay with it. A fetch passes from thread to thread as one `Transfer`, which owns
its slots until it is `released`.

Staging: what no cache admits travels through staging slots, one for each reader on the host and, behind a link, as many
on the accelerator. A reader waits for a free one; the computing thread frees them as it uses what has landed, in the
order of landing, so the wait always ends.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cache.errors import TransferError
from cache.types import ExpertKey, Tier
from offload.arena import Slots
from offload.device import Device
from offload.manager import Fetch
from offload.store import ExpertReader, ExpertStore

READERS = 2  # one copies out of its bounce buffer while the other one waits for the disk


@dataclass(slots=True)
class Staging:
    """A slot for what is not cached. `fence` marks the last work that may still read it."""

    slot: torch.Tensor
    fence: Any = None


@dataclass(slots=True)
class Transfer:
    """A fetch under way: where its bytes are on each tier, and how it ended.

    An expert is read in `parts`, by as many readers; `lock` guards what they share.
    """

    fetch: Fetch
    fence: Any
    parts: int = 1
    parts_left: int = 1
    lock: threading.Lock = field(default_factory=threading.Lock)
    host: torch.Tensor | None = None
    device: torch.Tensor | None = None
    host_staging: Staging | None = None
    device_staging: Staging | None = None
    bytes_from_disk: int = 0
    error: BaseException | None = None

    @property
    def computing_slot(self) -> torch.Tensor:
        """Where the expert can be computed from."""
        slot = self.device if self.device is not None else self.host
        if slot is None:
            raise RuntimeError(f"{self.fetch.key} has not landed")
        return slot


class TransferEngine:
    """Moves experts. `submit` and `landed` are the computing thread's; everything else happens on the engine's threads.

    `host_slots` and `device_slots` are the caches' memory (device_slots: empty where the CPU computes). Which expert
    lies in which slot is kept here and changes only in `submit` and `landed`.
    """

    def __init__(
        self,
        store: ExpertStore,
        device: Device,
        slots: dict[Tier, Slots],
        host_staging: Sequence[torch.Tensor],
        device_staging: Sequence[torch.Tensor] = (),
    ) -> None:
        self._device = device
        self._free = slots
        self._held: dict[tuple[Tier, ExpertKey], torch.Tensor] = {}
        self._store = store
        self._reads: queue.SimpleQueue[tuple[Transfer, int] | None] = queue.SimpleQueue()
        self._copies: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._landed: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._host_staging = _pool(host_staging)
        self._device_staging = _pool(device_staging)
        self._outstanding = 0
        self.stall_s = 0.0
        readers = [store.open() for _ in range(READERS)]
        self._threads = [
            threading.Thread(target=self._read_loop, args=(reader,), name=f"offload-read-{i}", daemon=True)
            for i, reader in enumerate(readers)
        ]
        if device.is_accelerator:
            self._threads.append(threading.Thread(target=self._copy_loop, name="offload-link", daemon=True))
        for thread in self._threads:
            thread.start()

    def slot(self, tier: Tier, key: ExpertKey) -> torch.Tensor:
        """Where a resident expert's bytes are."""
        return self._held[tier, key]

    def submit(self, fetches: Sequence[Fetch]) -> None:
        """Start `fetches`, in this order. What they evict is given up at once; nothing may still be computing with it
        except work already given to the device, after which the copies wait."""
        if not fetches:
            return
        fence = self._device.fence()
        for fetch in fetches:
            for tier, victims in fetch.evicted.items():
                for victim in victims:
                    self._free[tier].give(self._held.pop((tier, victim)))
            transfer = Transfer(fetch, fence)
            if fetch.source is Tier.CPU:
                transfer.host = self._held[Tier.CPU, fetch.key]
            for tier in fetch.admitted:
                slot = self._held[tier, fetch.key] = self._free[tier].take()
                if tier is Tier.CPU:
                    transfer.host = slot
                else:
                    transfer.device = slot
            if fetch.source is Tier.CPU:
                self._outstanding += 1
                self._copies.put(transfer)
                continue
            transfer.parts = transfer.parts_left = self._store.parts(fetch.key, READERS)
            self._outstanding += 1
            for part in range(transfer.parts):
                self._reads.put((transfer, part))

    def landed(self) -> Iterator[Transfer]:
        """Every submitted transfer, as it lands or fails; the time spent waiting counts as stall."""
        while self._outstanding:
            start = time.perf_counter()
            transfer = self._landed.get()
            self.stall_s += time.perf_counter() - start
            self._outstanding -= 1
            if transfer.error is not None:
                for tier in transfer.fetch.admitted:
                    self._free[tier].give(self._held.pop((tier, transfer.fetch.key)))
            yield transfer

    def release(self, transfer: Transfer) -> None:
        """The computing thread has given the device all work on a landed transfer: its staging may be used again."""
        if transfer.host_staging is not None:
            self._host_staging.put(transfer.host_staging)
            transfer.host_staging = None
        if transfer.device_staging is not None:
            transfer.device_staging.fence = self._device.fence()
            self._device_staging.put(transfer.device_staging)
            transfer.device_staging = None

    def close(self) -> None:
        """Stop the threads. Outstanding transfers must have been received."""
        for thread in self._threads:
            (self._copies if thread.name == "offload-link" else self._reads).put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._held.clear()
        self._free.clear()
        self._host_staging = self._device_staging = _pool(())

    def _read_loop(self, reader: ExpertReader) -> None:
        self._device.start_worker()
        try:
            while (job := self._reads.get()) is not None:
                transfer, part = job
                try:
                    self._read(transfer, part, reader)
                except BaseException as error:  # handed to the computing thread, which raises it
                    transfer.error = transfer.error or _as_transfer_error(transfer, error)
                self._part_done(transfer)
        finally:
            reader.close()

    def _read(self, transfer: Transfer, part: int, reader: ExpertReader) -> None:
        with transfer.lock:  # the first reader waits for a staging slot, the others for the first
            if transfer.host is None:
                transfer.host_staging = self._host_staging.get()
                transfer.host = transfer.host_staging.slot
        nbytes = reader.read(transfer.fetch.key, transfer.host, part, transfer.parts)
        with transfer.lock:
            transfer.bytes_from_disk += nbytes

    def _part_done(self, transfer: Transfer) -> None:
        with transfer.lock:
            transfer.parts_left -= 1
            if transfer.parts_left:
                return
        copy = self._device.is_accelerator and transfer.error is None
        (self._copies if copy else self._landed).put(transfer)

    def _copy_loop(self) -> None:
        self._device.start_worker()
        while (transfer := self._copies.get()) is not None:
            try:
                self._copy(transfer)
            except BaseException as error:  # handed to the computing thread, which raises it
                transfer.error = _as_transfer_error(transfer, error)
            self._landed.put(transfer)

    def _copy(self, transfer: Transfer) -> None:
        fence = transfer.fence
        if transfer.device is None:
            staging = transfer.device_staging = self._device_staging.get()
            transfer.device, fence = staging.slot, staging.fence
        if transfer.host is None:
            raise RuntimeError(f"{transfer.fetch.key} is not in host memory")
        self._device.copy(transfer.device, transfer.host, fence)
        if transfer.host_staging is not None:  # the bytes have left it
            self._host_staging.put(transfer.host_staging)
            transfer.host_staging = None


def _as_transfer_error(transfer: Transfer, error: BaseException) -> TransferError:
    if isinstance(error, TransferError):
        return error
    wrapped = TransferError(f"moving expert {tuple(transfer.fetch.key)} failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _pool(slots: Sequence[torch.Tensor]) -> queue.SimpleQueue[Staging]:
    pool: queue.SimpleQueue[Staging] = queue.SimpleQueue()
    for slot in slots:
        pool.put(Staging(slot))
    return pool
