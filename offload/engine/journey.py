"""One fetch under way: where its bytes are, which staging it has, and what all of them together have moved."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cache.errors import TransferError
from offload.decide.plan import Fetch
from offload.system.text import summary


@dataclass(slots=True)
class Staging:
    """A slot for what is not cached. `fence` marks the last work that may still read it."""

    slot: torch.Tensor
    fence: Any = None


@dataclass(slots=True)
class Bundle:
    """Staging on the device for one expert, with a slot for each slice, so that an expert which has a place waits for
    none. `used` counts the slices that are in it; `fence` marks the last work that may still read it."""

    slots: Sequence[torch.Tensor]
    used: int = 0
    fence: Any = None


@dataclass(slots=True)
class Transfer:
    """A fetch under way: where its bytes are on each tier, and how it ended.

    An expert is read in `parts`, by one reader or several; `lock` guards what they share. `copied` are the bytes of it
    that have crossed the link. The computing thread waits for it if it is `urgent`.
    """

    fetch: Fetch
    fence: Any
    parts: int = 1
    parts_left: int = 1
    lock: threading.Lock = field(default_factory=threading.Lock)
    host: torch.Tensor | None = None
    device: torch.Tensor | None = None
    host_staging: Staging | None = None
    device_staging: Bundle | None = None
    urgent: bool = True
    copied: int = 0
    bytes_from_disk: int = 0
    error: BaseException | None = None

    @property
    def computing_slot(self) -> torch.Tensor:
        """Where the expert can be computed from."""
        slot = self.device if self.device is not None else self.host
        if slot is None:
            raise RuntimeError(f"{self.fetch.key} has not landed")
        return slot


@dataclass(frozen=True, slots=True)
class Copy:
    """What has begun to cross the link: a transfer, or a chunk of it, of which `last` says whether more follow."""

    transfer: Transfer
    mark: Any
    start_s: float
    last: bool


@dataclass(slots=True)
class Traffic:
    """What has been moved so far, in experts' first slices, and for how long the channels were at it: the disk, while
    any reader was busy, and the link.

    Each number is written by one thread, or under a lock, and read by another at any time.
    """

    read: float = 0.0
    read_s: float = 0.0
    copied: float = 0.0
    copied_s: float = 0.0
    busy_readers: int = 0
    busy_since_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def totals(self) -> tuple[float, float, float, float]:
        """All of it, in the order above."""
        with self.lock:
            return self.read, self.read_s, self.copied, self.copied_s

    def begin_read(self) -> None:
        """One reader more is busy."""
        with self.lock:
            if not self.busy_readers:
                self.busy_since_s = time.perf_counter()
            self.busy_readers += 1

    def end_read(self) -> None:
        """One less."""
        with self.lock:
            self.busy_readers -= 1
            if not self.busy_readers:
                self.read_s += time.perf_counter() - self.busy_since_s


def as_transfer_error(transfer: Transfer, error: BaseException) -> TransferError:
    if isinstance(error, TransferError):
        return error
    wrapped = TransferError(f"moving expert {tuple(transfer.fetch.key)} failed: {summary(error)}")
    wrapped.__cause__ = error
    return wrapped


def pool(slots: Sequence[torch.Tensor]) -> queue.SimpleQueue[Staging | None]:
    pool: queue.SimpleQueue[Staging | None] = queue.SimpleQueue()
    for slot in slots:
        pool.put(Staging(slot))
    return pool
