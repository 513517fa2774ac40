"""Preallocated memory for experts: equal slots, aligned, every page touched before the first token.

A fresh page costs several times what copying into it does (1.8 against 17 GB/s where this was measured), so slots are
made once and used again.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import torch

_HUGE_PAGE = 2 * 2**20


class HostRegion:
    """`nbytes` of zeroed host memory, page-aligned, in huge pages where the system gives them.

    `tensor` is a view of it (uint8 [nbytes]); the memory lives as long as any view does.
    """

    def __init__(self, nbytes: int) -> None:
        # Private memory: the default, shared memory, gets no huge pages on most systems.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._map = mmap.mmap(-1, nbytes + _HUGE_PAGE, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: small ones do
                self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(self._map, np.uint8)
        start = -whole.ctypes.data % _HUGE_PAGE
        self.array = whole[start : start + nbytes]
        self.array[:: mmap.PAGESIZE] = 0
        self.tensor = torch.from_numpy(self.array)


class Slots:
    """The free and used slots of one tier: which expert's bytes lie where. Moves no bytes.

    Not thread-safe: the thread that makes the cache's decisions calls it.
    """

    def __init__(self, slots: list[torch.Tensor]) -> None:
        self._all = slots[::-1]
        self._free = list(self._all)
        self.count = len(slots)

    def take(self) -> torch.Tensor:
        """A free slot. The caches' byte accounting guarantees that there is one."""
        if not self._free:
            raise RuntimeError(f"all {self.count} slots are in use")
        return self._free.pop()

    def give(self, slot: torch.Tensor) -> None:
        """Take a slot back."""
        self._free.append(slot)

    def give_all(self) -> None:
        """Take every slot back."""
        self._free = list(self._all)
