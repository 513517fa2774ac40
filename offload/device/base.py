"""What a device is, and the plain one, the CPU. An accelerator has memory of its own, behind a link."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cache.types import Tier
from offload.device.arena import HostRegion


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
        return carve(HostRegion(count * nbytes).tensor, count, nbytes)

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


def carve(block: torch.Tensor, count: int, nbytes: int) -> list[torch.Tensor]:
    """`count` slots of `nbytes` each, one after the other in `block` (uint8); no copy."""
    return [block[i * nbytes : (i + 1) * nbytes] for i in range(count)]
