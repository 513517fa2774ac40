"""Host memory and the accelerator's link: what reading and copying cost, alone and while the CPU computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from cache.errors import ProfileError
from offload.costs.machine import CopyTime, LinkProfile
from offload.device.arena import HostRegion
from offload.device.base import Device
from offload.machine.budget import UNLIMITED, Budget
from offload.machine.threads import torch_threads
from offload.system.sizes import format_bytes

_MOST_S = 0.1
T = TypeVar("T")


def measure_link(
    device: Device, copy_bytes: Sequence[int], compute: Callable[[], object], budget: Budget
) -> LinkProfile:
    """Copies of two sizes over the device's link, on a thread like the runtime's: from memory that is pinned and not,
    alone and while other threads of the runtime's kind run `compute`.

    The sizes are the smallest and the largest that a slow link has time for. Unverified on CUDA. Raises ProfileError on
    a machine too busy to tell them apart.
    """
    largest = max(copy_bytes)
    pinned, pageable = device.host_slots(1, largest)[0], HostRegion(largest).tensor
    there = device.allocate(1, largest)[0]

    def measure(source: torch.Tensor) -> CopyTime:
        def copy_s(nbytes: int) -> float:
            return budget.median_s(lambda: device.copy(there[:nbytes], source[:nbytes], None), _MOST_S)

        small, *larger = sorted(copy_bytes)
        small_s = copy_s(small)
        fitting = [nbytes for nbytes in larger if budget.fits(small_s * nbytes / small)] or larger[:1]
        return _line({small: small_s, fitting[-1]: copy_s(fitting[-1])}, device.name)

    alone = [on_worker(device, partial(measure, source)) for source in (pinned, pageable)]
    with repeating(device, compute):
        beside = [on_worker(device, partial(measure, source)) for source in (pinned, pageable)]
    return LinkProfile(
        pinned=alone[0],
        pinned_computing=_not_faster(beside[0], alone[0]),
        pageable=alone[1],
        pageable_computing=_not_faster(beside[1], alone[1]),
    )


def host_read_bytes_per_s(block: torch.Tensor, threads: int, budget: Budget = UNLIMITED) -> float:
    """How fast `threads` threads read host memory (uint8, larger than the processor's cache)."""
    numbers = block[: len(block) // 8 * 8].view(torch.int64)
    with torch_threads(threads):
        return 8 * len(numbers) / budget.median_s(lambda: numbers.sum(), _MOST_S)


def host_copy_bytes_per_s(nbytes: int, budget: Budget) -> float:
    """How fast one thread copies memory that the processor's cache has forgotten, so many bytes at a time."""
    source, destination = (HostRegion(4 * nbytes).tensor.split(nbytes) for _ in range(2))
    turns = [0]

    def copy() -> None:  # other memory each time
        turns[0] = (turns[0] + 1) % len(source)
        destination[turns[0]].numpy()[:] = source[turns[0]].numpy()

    return nbytes / budget.median_s(copy, _MOST_S)


def hand_over_s(device: Device, budget: Budget) -> float:
    """Giving work to another thread, which has none before, and getting word from it that it is done."""
    jobs: queue.SimpleQueue[bool] = queue.SimpleQueue()
    done: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def work() -> None:
        device.start_worker()
        while jobs.get():
            done.put(True)

    def hand_over() -> None:
        jobs.put(True)
        done.get()

    worker = threading.Thread(target=work, name="offload-profile-worker")
    worker.start()
    try:
        with device.computing():
            return budget.median_s(hand_over, _MOST_S)
    finally:
        jobs.put(False)
        worker.join()


def on_worker(device: Device, action: Callable[[], T]) -> T:
    """What `action` returns or raises, run on a thread like those that move the device's bytes."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        device.start_worker()
        try:
            results.append(action())
        except BaseException as error:  # raised below, on the thread that asked
            errors.append(error)

    worker = threading.Thread(target=run, name="offload-profile-copy")
    worker.start()
    worker.join()
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def repeating(device: Device, action: Callable[[], object]) -> Iterator[None]:
    """Beside the block, one of the device's worker threads runs `action` over and over."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            action()

    worker = threading.Thread(target=on_worker, args=(device, run), name="offload-profile-compute")
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()


def _line(times: dict[int, float], device: str) -> CopyTime:
    """The rate is that between the smallest and the largest size; the rest is latency."""
    small, large = min(times), max(times)
    if times[large] <= times[small]:
        raise ProfileError(
            f"copying {format_bytes(large)} to {device} took no longer than {format_bytes(small)}: "
            "this machine is too busy to be measured; try again when it is idle"
        )
    bytes_per_s = (large - small) / (times[large] - times[small])
    return CopyTime(max(times[small] - small / bytes_per_s, 0.0), bytes_per_s)


def _not_faster(beside: CopyTime, alone: CopyTime) -> CopyTime:
    """Computing makes no copy faster: where it seems so, other programs held the other one up."""
    return CopyTime(max(beside.latency_s, alone.latency_s), min(beside.bytes_per_s, alone.bytes_per_s))
