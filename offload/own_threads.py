"""One token's large products on this project's own threads, with torch on one.

OpenMP's workers watch for work for milliseconds after each small operation that torch has shared with them, on the very
processors that the kernels' pool and the readers want. Where all large products are the pool's, torch has nothing to
gain by them: it computes what is left on the calling thread alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_kept: int | None = None


def count() -> int:
    """How many threads our kernels share a product out over: as many as torch may use, or might before `alone`."""
    return torch.get_num_threads() if _kept is None else _kept


@contextmanager
def alone() -> Iterator[None]:
    """In here torch computes on one thread, and our kernels on as many as before. For one thread at a time."""
    global _kept
    _kept = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_kept)
        _kept = None
