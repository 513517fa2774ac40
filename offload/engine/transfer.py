"""The live transfer engine: disk -> host -> accelerator, on threads of its own.

Readers take experts from disk into host slots, one thread feeds the link. The thread that computes submits fetches and
receives them as they land; decisions stay with it. A fetch passes from thread to thread as one `Transfer`, which owns
its slots until it is `released`. The threads are in `offload/engine/disk.py` and `link.py`.

What an event waits for is urgent and overtakes what was prefetched. A prefetch is read and copied in chunks, and after
each of them the thread looks for something urgent. When an event comes to need what is being prefetched, the rest of
it becomes urgent; one that has not begun can be taken back.

Staging: what no cache admits travels through staging slots, a few on the host, which more readers may share, and,
behind a link, as many on the accelerator (`offload/engine/staging.py`). A reader waits for a free one; the computing
thread frees them as it uses what has landed, in the order of landing, so the wait always ends. A prefetch always has
places reserved and needs none. The slices of one expert are read one after the other.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from cache.types import ExpertKey, Tier
from offload.decide.plan import Dropped, Fetch
from offload.device.arena import Slots
from offload.device.base import Device
from offload.engine.disk import Disk
from offload.engine.journey import Traffic, Transfer, pool
from offload.engine.link import Link
from offload.engine.slot_places import Places
from offload.engine.staging import DeviceStaging
from offload.store.base import ExpertStore, SliceReader
from offload.store.readers import READERS


class TransferEngine:
    """Moves experts. Its methods are for the computing thread; the work happens on the engine's own threads.

    `slots` are the caches' memory: of each tier, for each of the store's slices; staging slots are listed by slice,
    too. Which expert lies in which slot is kept here and changes only in those methods. `readers` threads read from
    disk: so many reads are under way at once.
    """

    def __init__(
        self,
        store: ExpertStore,
        device: Device,
        slots: Mapping[Tier, Sequence[Slots]],
        host_staging: Sequence[Sequence[torch.Tensor]],
        device_staging: Sequence[Sequence[torch.Tensor]] = (),
        readers: int = READERS,
    ) -> None:
        self._device = device
        self._readers = readers
        self._slot_bytes = store.slot_bytes
        self._store = store
        self._places = Places(slots)
        self._staging_slots = host_staging, device_staging
        self._threads: list[threading.Thread] = []
        self.stall_s = 0.0
        self.changes = 0
        """Goes up with whatever may change what lies where, or is there."""
        self.traffic = Traffic()
        self._begin()

    def _begin(self) -> None:
        """Nothing is under way, all staging is free, and the threads wait for work."""
        host_staging, device_staging = self._staging_slots
        self._urgent = 0  # outstanding transfers that somebody waits for
        self._prefetches: dict[tuple[int, ExpertKey], Transfer] = {}  # outstanding ones that nobody waits for
        self._landed: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._host_staging = [pool(each) for each in host_staging]
        self._staging = DeviceStaging(self._device, device_staging)
        device, traffic = self._device, self.traffic
        self._link = Link(device, self._staging, self._landed.put, self._host_staging, traffic)
        self._disk = Disk(device, self._store.slices, self._readers, self._was_read, self._host_staging, traffic)
        self._copies, self._reads = self._link.copies, self._disk.reads
        own = [[each.open() for each in self._store.slices] for _ in range(self._readers)]
        self._threads = [
            threading.Thread(target=self._disk.run, args=(each,), name=f"offload-read-{i}", daemon=True)
            for i, each in enumerate(own)
        ]
        if device.is_accelerator:
            self._threads.append(threading.Thread(target=self._link.run, name="offload-link", daemon=True))
        for thread in self._threads:
            thread.start()

    def _stop(self) -> None:
        """Wait for what the threads are at, and end them; what they have not begun is dropped."""
        self._disk.stop()
        self._copies.close()
        self._staging.close()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def restart(self) -> None:
        """Forget what lies where and what is under way, whatever state this is in, and begin anew."""
        self._stop()
        self._places.give_all()
        self.changes += 1
        self._begin()

    @property
    def waits_for_products(self) -> bool:
        """Whether the time that a product's call takes is the product's time."""
        return self._device.waits

    def slot(self, tier: Tier, key: ExpertKey, slice_: int = 0) -> torch.Tensor:
        """Where the bytes of an expert's resident slice are."""
        return self._places.slot(tier, slice_, key)

    def held(self, tier: Tier, slice_: int) -> set[ExpertKey]:
        """The experts of which a slice has a place in a tier's cache."""
        return self._places.held(tier, slice_)

    def submit(self, fetches: Sequence[Fetch]) -> None:
        """Start `fetches`, in this order. What they evict is given up at once; nothing may still be computing with it
        except work already given to the device, after which the copies wait."""
        self._start(fetches, urgent=True)

    def prefetch(self, fetches: Sequence[Fetch]) -> None:
        """Start `fetches` behind everything else; all of them must have been admitted. Evicts as `submit` does."""
        self._start(fetches, urgent=False)

    def drop(self, dropped: Sequence[Dropped]) -> None:
        """Give these places up, as what is evicted for a fetch gives up its own."""
        if dropped:
            self.changes += 1
        for each in dropped:
            self._places.give(each.tier, each.slice, each.keys)

    def load(self, key: ExpertKey, slice_: int, reader: SliceReader) -> None:
        """Read a slice into host memory on the calling thread; its place there must have been reserved."""
        self.changes += 1
        reader.read(key, self._places.take(Tier.CPU, slice_, key))

    def await_(self, slices: Iterable[tuple[ExpertKey, int]]) -> None:
        """An event needs what is being prefetched of these slices of experts: from now on it is urgent, and `landed`
        waits for it."""
        for key, slice_ in slices:
            transfer = self._prefetches.pop((slice_, key), None)
            if transfer is None:
                continue
            transfer.urgent = True
            self._urgent += 1
            self._reads.hurry(lambda job, wanted=transfer: job[0] is wanted)  # type: ignore[misc]
            self._copies.hurry(lambda job, wanted=transfer: job is wanted)  # type: ignore[misc]

    def cancel(self, fetch: Fetch) -> bool:
        """Take a prefetch back if none of it has been read or copied; says whether that was so."""
        transfer = self._prefetches.get((fetch.slice, fetch.key))
        if transfer is None or transfer.fetch is not fetch:
            return False
        if fetch.source is Tier.CPU:
            taken = transfer.copied == 0 and self._copies.withdraw(lambda job: job is transfer, 1)
        else:
            taken = self._reads.withdraw(lambda job: job[0] is transfer, transfer.parts)
        if taken:
            del self._prefetches[fetch.slice, fetch.key]
            self._give_back(transfer)
        return taken

    def landed(self) -> Iterator[Transfer]:
        """Transfers as they land or fail, until all urgent ones have; the time spent waiting counts as stall."""
        while self._urgent:
            start = time.perf_counter()
            transfer = self._landed.get()
            self.stall_s += time.perf_counter() - start
            yield self._receive(transfer)

    def landed_meanwhile(self) -> Iterator[Transfer]:
        """Transfers that have landed or failed by now, without waiting."""
        while self._urgent or self._prefetches:  # asked for every layer of every token: an empty queue takes longer
            try:
                transfer = self._landed.get_nowait()
            except queue.Empty:
                return
            yield self._receive(transfer)

    def settled(self) -> Iterator[Transfer]:
        """Transfers as they land or fail, until none is outstanding."""
        while self._urgent or self._prefetches:
            yield self._receive(self._landed.get())

    def _receive(self, transfer: Transfer) -> Transfer:
        self.changes += 1
        if transfer.urgent:
            self._urgent -= 1
        else:
            del self._prefetches[transfer.fetch.slice, transfer.fetch.key]
        if transfer.error is not None:
            self._give_back(transfer)
            if self._staging.needed_by(transfer):
                self._staging.withdraw(transfer.fetch.key)
            return transfer
        size = self._slot_bytes[transfer.fetch.slice] / self._slot_bytes[0]
        if transfer.fetch.source is Tier.DISK:
            self.traffic.read += size
        if self._device.is_accelerator and not transfer.fetch.to_host:
            self.traffic.copied += size
        return transfer

    def _give_back(self, transfer: Transfer) -> None:
        self.changes += 1
        fetch = transfer.fetch
        for tier in fetch.admitted:
            self._places.give(tier, fetch.slice, [fetch.key])

    def _start(self, fetches: Sequence[Fetch], *, urgent: bool) -> None:
        if not fetches:
            return
        self.changes += 1
        fence = self._device.fence()
        for fetch in fetches:
            index = fetch.slice
            for tier, victims in fetch.evicted.items():
                self._places.give(tier, index, victims)
            transfer = Transfer(fetch, fence, urgent=urgent)
            if fetch.source is Tier.CPU:
                transfer.host = self._places.slot(Tier.CPU, index, fetch.key)
            for tier in fetch.admitted:
                slot = self._places.take(tier, index, fetch.key)
                if tier is Tier.CPU:
                    transfer.host = slot
                else:
                    transfer.device = slot
            if self._staging.needed_by(transfer):
                self._staging.announce(transfer)
            if fetch.source is Tier.CPU:
                self._copies.put([transfer], urgent=urgent)
            else:
                self._disk.put(transfer)
            if urgent:  # counted last: nobody waits for what an error has kept from starting
                self._urgent += 1
            else:
                self._prefetches[index, fetch.key] = transfer

    def release(self, transfer: Transfer) -> None:
        """All work on a landed transfer was given to the device, or done on the host: its staging may be used again.

        For the computing thread; of what was fetched `to_host`, any thread may say so.
        """
        if transfer.host_staging is not None:
            self._host_staging[transfer.fetch.slice].put(transfer.host_staging)
            transfer.host_staging = None
        if transfer.device_staging is not None:
            self._staging.release(transfer.fetch.key, transfer.device_staging)
            transfer.device_staging = None

    def close(self) -> None:
        """Stop the threads, after what they are at, and forget all memory."""
        self._stop()
        self._prefetches.clear()
        self._places.clear()
        self._staging_slots = (), ()
        self._host_staging.clear()
        self._staging.clear()

    def _was_read(self, transfer: Transfer) -> None:
        """On a reader's thread: a transfer is in host memory, or has failed."""
        if self._device.is_accelerator and not transfer.fetch.to_host and transfer.error is None:
            self._link.put(transfer)
        else:
            self._landed.put(transfer)
