"""The readers' threads: what comes from disk into host memory, the urgent first, in parts of an expert or chunks."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

from offload.decide.pace import CHUNK_BYTES
from offload.decide.plan import Fetch
from offload.device.base import Device
from offload.engine.channel import Channel
from offload.engine.journey import Staging, Traffic, Transfer, as_transfer_error
from offload.store.base import ExpertSlice, SliceReader


class Disk:
    """Reads until its channel is closed: `run` is each thread, of which there are `threads`.

    `read` is told of every transfer that is in host memory, or failed; `host_staging` gives places, by slice. A None
    among them ends the wait for one.
    """

    def __init__(
        self,
        device: Device,
        slices: Sequence[ExpertSlice],
        threads: int,
        read: Callable[[Transfer], object],
        host_staging: Sequence[queue.SimpleQueue[Staging | None]],
        traffic: Traffic,
    ) -> None:
        self.reads: Channel[tuple[Transfer, int]] = Channel()
        self._device = device
        self._slices = slices
        self._threads = threads
        self._read_whole = read
        self._host_staging = host_staging
        self._traffic = traffic

    def put(self, transfer: Transfer) -> None:
        """Let a transfer be read: an urgent one in a part for each reader, else in chunks."""
        transfer.parts = transfer.parts_left = self._parts(transfer.fetch, urgent=transfer.urgent)
        self.reads.put([(transfer, part) for part in range(transfer.parts)], urgent=transfer.urgent)

    def stop(self) -> None:
        """No more reads; whoever waits for a place goes without."""
        self.reads.close()
        for places in self._host_staging:
            for _ in range(self._threads):
                places.put(None)

    def run(self, readers: Sequence[SliceReader]) -> None:
        """Read until the channel is closed."""
        self._device.start_worker()
        try:
            while (job := self.reads.get()) is not None:
                transfer, part = job
                self._traffic.begin_read()
                try:
                    self._read(transfer, part, readers[transfer.fetch.slice])
                except BaseException as error:  # handed to the computing thread, which raises it
                    transfer.error = transfer.error or as_transfer_error(transfer, error)
                self._traffic.end_read()
                self._part_done(transfer)
        finally:
            for reader in readers:
                reader.close()

    def _parts(self, fetch: Fetch, *, urgent: bool) -> int:
        wanted, key = self._slices[fetch.slice], fetch.key
        return wanted.parts(
            key, self._threads if urgent else max(self._threads, -(-wanted.record_bytes(key) // CHUNK_BYTES))
        )

    def _read(self, transfer: Transfer, part: int, reader: SliceReader) -> None:
        with transfer.lock:  # the first reader waits for a staging slot, the others for the first
            if transfer.host is None:
                transfer.host_staging = self._host_staging[transfer.fetch.slice].get()
                if transfer.host_staging is None:
                    raise RuntimeError("the engine was stopped")
                transfer.host = transfer.host_staging.slot
        nbytes = reader.read(transfer.fetch.key, transfer.host, part, transfer.parts)
        with transfer.lock:
            transfer.bytes_from_disk += nbytes

    def _part_done(self, transfer: Transfer) -> None:
        with transfer.lock:
            transfer.parts_left -= 1
            if transfer.parts_left:
                return
        self._read_whole(transfer)
