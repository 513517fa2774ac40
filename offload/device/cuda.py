"""A CUDA GPU as a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cache.types import Tier
from offload.device.arena import HostRegion
from offload.device.base import Device, carve


class CudaDevice(Device):
    """A CUDA GPU: pinned host memory, one stream for copies, events between it and the computing stream.

    Written from the documentation; see docs/benchmarks.md for whether it has run on hardware yet.
    """

    tier = Tier.GPU
    is_accelerator = True
    waits = False

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        self._copies = torch.cuda.Stream(self.torch_device)
        self._pinned: list[HostRegion] = []
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        """Slots in one block of GPU memory."""
        block = torch.empty(count * nbytes, dtype=torch.uint8, device=self.torch_device)
        return carve(block, count, nbytes)

    def host_slots(self, count: int, nbytes: int) -> list[torch.Tensor]:
        """Slots in page-locked host memory; falls back to pageable memory where the driver refuses."""
        region = HostRegion(count * nbytes)
        if count and int(torch.cuda.cudart().cudaHostRegister(region.array.ctypes.data, count * nbytes, 0)) == 0:
            self._pinned.append(region)
        return carve(region.tensor, count, nbytes)

    copies_at_once = 2

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> None:
        """Both of the following, one after the other."""
        self.end_copy(self.begin_copy(destination, source, after))

    def begin_copy(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Runs on the copy stream after the event `after`, behind the copies begun before; gives an event of its own.

        Until that has come, the caller keeps `source` alive and unwritten, and nobody reads `destination`.
        """
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            destination.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._copies)
        return done

    def end_copy(self, begun: Any) -> None:
        """The calling thread waits for the copy's event."""
        begun.synchronize()

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """By way of pinned memory, on the computing stream; torch keeps that memory until the copy is done."""
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def read_later(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """On the computing stream, into pinned memory that the result keeps alive; waits for the copy's own event."""
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copied.copy_(tensor, non_blocking=True)
        done = self.fence()

        def read() -> torch.Tensor:
            done.synchronize()
            return copied

        return read

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What is launched goes to this GPU, also where another one is torch's current one."""
        with torch.cuda.device(self.torch_device):
            yield

    def fence(self) -> Any:
        """An event on the computing stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def memory_bytes(self) -> int | None:
        """What the driver says is free."""
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def peak_bytes(self) -> int | None:
        """The caching allocator's high-water mark: everything torch ever held at once."""
        return int(torch.cuda.max_memory_reserved(self.torch_device))

    def close(self) -> None:
        """Unpins host memory and returns cached GPU memory."""
        torch.cuda.synchronize(self.torch_device)
        for region in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(region.array.ctypes.data)
        self._pinned.clear()
        torch.cuda.empty_cache()
