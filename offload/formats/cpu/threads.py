"""One token's large products on this project's own threads, with torch on one.

OpenMP's workers watch for work for milliseconds after each small operation that torch has shared with them, on the very
processors that the kernels' pool and the readers want. Where all large products are the pool's, torch has nothing to
gain by them: it computes what is left on the calling thread alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Kept(threading.local):
    count: int | None = None
    begun = False


_kept = _Kept()


def count() -> int:
    """How many threads our kernels share a product out over: as many as torch may use, or might before `alone`."""
    return torch.get_num_threads() if _kept.count is None else _kept.count


def begin(threads: int) -> None:
    """Before the first pass on the calling thread: if torch gave it one thread only, let it have so many.

    A thread takes over what torch was told last, and that may have been another thread's `alone`.
    """
    if not _kept.begun:
        _kept.begun = True
        if torch.get_num_threads() == 1:
            torch.set_num_threads(threads)


@contextmanager
def alone() -> Iterator[None]:
    """In here torch computes on one thread, and our kernels on as many as before.

    Of the calling thread alone; but see `begin` for one that uses torch for the first time meanwhile.
    """
    outer, threads = _kept.count, torch.get_num_threads()
    _kept.count = count()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _kept.count = outer
