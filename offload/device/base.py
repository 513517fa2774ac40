"""Where experts are computed: the CPU, a CUDA GPU, or an emulated accelerator. The only file that names torch.cuda.

An accelerator has memory of its own, behind a link. The emulated one is made of host memory under its own budget, and
its link has a stated speed: the bytes are really copied, then held back until the stated time has passed. It runs every
code path of a real one on any machine.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from cache.errors import DeviceError
from cache.types import Tier
from offload.device.arena import HostRegion
from offload.system.sizes import format_bytes, parse_rate


class Device(ABC):
    """One place where experts are computed.

    `torch_device` is where hidden states and dense weights live, `tier` the cache tier whose experts it can use.
    """

    name: str
    torch_device: torch.device
    tier: Tier
    is_accelerator: bool
    waits = True
    """Whether a product is done when its call returns, so that the time between is its time."""

    @abstractmethod
    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        """`count` slots (uint8 [nbytes], 64-byte aligned) in this device's memory, ready for use."""

    def host_slots(self, count: int, nbytes: int) -> list[torch.Tensor]:
        """`count` slots in host memory that `copy` can read at full speed."""
        return _carve(HostRegion(count * nbytes).tensor, count, nbytes)

    @abstractmethod
    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> None:
        """Move a slot's bytes over the link; returns when they can be used. Called from the link's own thread.

        `after` is a `fence`: the copy starts when the work before it is done, so nothing still reads `destination`.
        """

    copies_at_once = 1
    """How many copies may have begun before the first of them is waited for, so that the link is never idle between. So
    many chunks of prefetches may go before what is urgent."""

    def begin_copy(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Start what `copy` does; what it gives is for `end_copy`. Copies end in the order in which they begin.

        Until its end the caller keeps `source` alive and unwritten, and nobody reads `destination`.
        """
        self.copy(destination, source, after)

    def end_copy(self, begun: Any) -> None:  # noqa: B027 - most devices have copied by then
        """Return when the bytes can be used."""

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A small tensor in host memory, on the device, for work that is given to it from now on; does not wait."""
        return tensor

    def read_later(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start copying a small tensor of the device to host memory. What is returned waits for the copy and gives it.

        Whatever is given to the device later may overwrite `tensor`.
        """
        copied = tensor.clone()
        return lambda: copied

    def fence(self) -> Any:
        """A mark after all work given to the device so far; None where work is done when the call returns."""
        return None

    @abstractmethod
    def memory_bytes(self) -> int | None:
        """Bytes of the device's memory that are free for us now; None where it has none of its own."""

    def peak_bytes(self) -> int | None:
        """The most bytes of the device's memory in use so far; None where they cannot be measured."""
        return None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around every forward pass, on the thread that runs it."""
        yield

    @property
    def threads_beside(self) -> int:
        """How many threads may compute on the CPU while the device computes, unless the user says."""
        return torch.get_num_threads()

    def start_worker(self) -> None:  # noqa: B027 - most devices need nothing here
        """Called first on every thread that moves bytes or computes beside the device."""

    def close(self) -> None:  # noqa: B027 - most devices need nothing here
        """Give back what was taken outside Python's memory management."""


class CpuDevice(Device):
    """The CPU computes; RAM is the fast tier and there is no link."""

    name = "cpu"
    torch_device = torch.device("cpu")
    tier = Tier.CPU
    is_accelerator = False

    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        """Slots in prefaulted host memory."""
        return self.host_slots(count, nbytes)

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> None:
        """There is no link to copy over."""
        raise RuntimeError("the CPU has no link")

    def memory_bytes(self) -> int | None:
        """The CPU's memory is the host's."""
        return None


class EmulatedDevice(Device):
    """An accelerator made of host memory, behind a link of stated speed.

    Computes with one thread on one core of its own (the first this process may use); what moves bytes, or computes
    beside it, has the others.
    """

    name = "emulated"
    torch_device = torch.device("cpu")
    tier = Tier.GPU
    is_accelerator = True

    def __init__(self, link_bytes_per_s: float) -> None:
        self.link_bytes_per_s = link_bytes_per_s
        self._cores = _usable_cores()

    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        """Slots in prefaulted host memory that counts as the accelerator's."""
        return self.host_slots(count, nbytes)

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> None:
        """Copies the bytes, then waits until the link would have delivered them."""
        done = time.perf_counter() + source.numel() / self.link_bytes_per_s
        destination.numpy()[:] = source.numpy()
        while (left := done - time.perf_counter()) > 0:
            time.sleep(left)

    def memory_bytes(self) -> int | None:
        """Half of what the host has free: the other half is the CPU tier's."""
        return psutil.virtual_memory().available // 2

    @contextmanager
    def computing(self) -> Iterator[None]:
        """One core, for the accelerator alone."""
        if len(self._cores) < 2:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cores[:1])
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    @property
    def threads_beside(self) -> int:
        """One for each core that is not the accelerator's."""
        return max(len(self._cores) - 1, 1)

    def start_worker(self) -> None:
        """The cores that are not the accelerator's."""
        if len(self._cores) >= 2:
            os.sched_setaffinity(0, self._cores[1:])


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
        return _carve(block, count, nbytes)

    def host_slots(self, count: int, nbytes: int) -> list[torch.Tensor]:
        """Slots in page-locked host memory; falls back to pageable memory where the driver refuses."""
        region = HostRegion(count * nbytes)
        if count and int(torch.cuda.cudart().cudaHostRegister(region.array.ctypes.data, count * nbytes, 0)) == 0:
            self._pinned.append(region)
        return _carve(region.tensor, count, nbytes)

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


def make_device(device: str = "auto", link: str | float | None = None) -> Device:
    """The device called `device`: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "emulated".

    `link` is the emulated link's speed, such as "3GB/s"; by default 3 GB/s or what this machine can emulate.
    Raises DeviceError for a device this machine lacks, and for a link faster than can be emulated honestly.
    """
    kind, _, index = device_kind(device).partition(":")
    if link is not None and kind != "emulated":
        raise DeviceError(f"--link states the speed of the emulated accelerator's link: it has no meaning on {kind}")
    if kind == "cpu" and not index:
        return CpuDevice()
    if kind == "emulated" and not index:
        return EmulatedDevice(_link_rate(link))
    if kind == "cuda" and (not index or index.isdecimal()):
        if not torch.cuda.is_available():
            raise DeviceError(
                "--device cuda: no CUDA GPU is usable here: use --device cpu, or install a CUDA build of torch"
            )
        if int(index or 0) >= torch.cuda.device_count():
            raise DeviceError(
                f"--device {device}: this machine has {torch.cuda.device_count()} CUDA GPUs, numbered from 0"
            )
        return CudaDevice(int(index or 0))
    raise DeviceError(f'device "{device}" is not one of auto, cpu, cuda, cuda:N, emulated')


def device_kind(device: str) -> str:
    """`device` as named, or what "auto" means on this machine."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _link_rate(link: str | float | None) -> float:
    limit = _memcpy_bytes_per_s() / 2
    if link is None:
        return min(3e9, limit)
    rate = parse_rate(link, "--link")
    if rate > limit:
        raise DeviceError(
            f"--link {link}: this machine copies memory at {format_bytes(2 * limit)}/s, and at most half of that, "
            f"{format_bytes(limit)}/s, can be emulated as a link"
        )
    return rate


def _memcpy_bytes_per_s(nbytes: int = 32 * 2**20, part: int = 2**20, repeats: int = 5) -> float:
    """How fast one thread copies memory: each part of a block at its best, as a busy machine interrupts long copies."""
    source, destination = (HostRegion(nbytes).array for _ in range(2))
    best = dict.fromkeys(range(0, nbytes, part), float("inf"))
    for _ in range(repeats):
        for at in best:
            start = time.perf_counter()
            destination[at : at + part] = source[at : at + part]
            best[at] = min(best[at], time.perf_counter() - start)
    return nbytes / sum(best.values())


def _usable_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _carve(block: torch.Tensor, count: int, nbytes: int) -> list[torch.Tensor]:
    return [block[i * nbytes : (i + 1) * nbytes] for i in range(count)]
