"""The link's thread: what crosses from host memory to the accelerator, the urgent first, the rest in chunks."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from offload.decide.pace import CHUNK_BYTES
from offload.device.base import Device
from offload.engine.channel import Channel
from offload.engine.journey import Copy, Staging, Traffic, Transfer, as_transfer_error
from offload.engine.staging import DeviceStaging

_RETRY_S = 0.0005


class Link:
    """Feeds the link until its channel is closed: `run` is the thread.

    `landed` is told of every transfer that has crossed, or failed; `host_staging` gets its places back, by slice.
    """

    def __init__(
        self,
        device: Device,
        staging: DeviceStaging,
        landed: Callable[[Transfer], object],
        host_staging: Sequence[queue.SimpleQueue[Staging | None]],
        traffic: Traffic,
    ) -> None:
        self.copies: Channel[Transfer] = Channel()
        self._device = device
        self._staging = staging
        self._landed = landed
        self._host_staging = host_staging
        self._traffic = traffic
        self._free_s = 0.0  # when the last copy ended

    def put(self, transfer: Transfer, *, first: bool = False) -> None:
        """Let a transfer cross behind others of its urgency, or before them."""
        urgent = transfer.urgent
        self.copies.put([transfer], urgent=urgent, first=first)
        if transfer.urgent and not urgent:  # it became so just now, on the computing thread
            self.copies.hurry(lambda job: job is transfer)

    def run(self) -> None:
        """Copy until the channel is closed."""
        self._device.start_worker()
        begun: deque[Copy] = deque()  # under way on the link, which takes the next one before the first has ended
        while True:
            transfer = self.copies.get(wait=not begun)
            if transfer is None:
                if not begun:
                    return
                self._end_copy(begun.popleft())
                continue
            if transfer.error is not None:  # a chunk of it did not arrive
                self._fail(transfer, begun)
                continue
            while begun and self._staging.needed_by(transfer):  # which may be with those who wait for what is under way
                self._end_copy(begun.popleft())
            if not self._staging.stage(transfer):
                self.put(transfer)
                time.sleep(_RETRY_S)
                continue
            start_s = time.perf_counter()
            try:
                mark = self._begin_copy(transfer)
            except BaseException as error:  # handed to the computing thread, which raises it
                self._traffic.copied_s += time.perf_counter() - start_s
                transfer.error = as_transfer_error(transfer, error)
                self._fail(transfer, begun)
                continue
            last = transfer.host is None or transfer.copied == transfer.host.numel()
            begun.append(Copy(transfer, mark, start_s, last))
            if not last:
                self.put(transfer, first=True)
            if len(begun) == self._device.copies_at_once:
                self._end_copy(begun.popleft())

    def _fail(self, transfer: Transfer, begun: deque[Copy]) -> None:
        """Land a transfer that failed, once nothing of it is under way."""
        while begun:
            self._end_copy(begun.popleft())
        self._landed(transfer)

    def _begin_copy(self, transfer: Transfer) -> Any:
        """Copy all of an urgent transfer, the next chunk of another."""
        if transfer.host is None or transfer.device is None:
            raise RuntimeError(f"{transfer.fetch.key} is not in host memory")
        start, end = transfer.copied, transfer.host.numel()
        if not transfer.urgent:
            end = min(start + CHUNK_BYTES, end)
        mark = self._device.begin_copy(transfer.device[start:end], transfer.host[start:end], transfer.fence)
        transfer.copied = end
        return mark

    def _end_copy(self, copy: Copy) -> None:
        """Wait for a copy; the last one of a transfer lands it."""
        transfer = copy.transfer
        try:
            self._device.end_copy(copy.mark)
        except BaseException as error:  # handed to the computing thread, which raises it
            transfer.error = transfer.error or as_transfer_error(transfer, error)
        now_s = time.perf_counter()
        self._traffic.copied_s += now_s - max(copy.start_s, self._free_s)
        self._free_s = now_s
        if not copy.last:
            return
        if transfer.host_staging is not None and transfer.error is None:  # the bytes have left it
            self._host_staging[transfer.fetch.slice].put(transfer.host_staging)
            transfer.host_staging = None
        self._landed(transfer)
