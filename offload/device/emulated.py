"""An accelerator on any machine, made of host memory under a budget of its own.

Its link has a stated speed: the bytes are really copied, then held back until the stated time has passed. So every code
path of a real accelerator runs without one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cache.errors import DeviceError
from cache.types import Tier
from offload.device.arena import HostRegion
from offload.device.base import Device
from offload.system.memory import available_bytes
from offload.system.sizes import format_bytes, parse_rate

_SLOWEST_BYTES_PER_S = 1e6


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
        return available_bytes() // 2

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


def link_rate(link: str | float | None) -> float:
    """Bytes per second of the link `link`, such as "3GB/s"; by default 3 GB/s, or what this machine can emulate.

    Raises DeviceError for a link faster than half of what memory is copied at, and for one on which nothing arrives.
    """
    limit = _memcpy_bytes_per_s() / 2
    if link is None:
        return min(3e9, limit)
    rate = parse_rate(link, "--link")
    if rate < _SLOWEST_BYTES_PER_S:
        raise DeviceError(f"--link {link}: an expert would take minutes: give at least 1MB/s")
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
