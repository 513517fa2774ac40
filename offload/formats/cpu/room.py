"""Memory that a kernel needs for one call, kept for the next: to allocate it takes longer than small products.

Calls of one thread come one after the other, so each thread has one piece. What is too large to be kept lives as long
as the caller holds it: who takes its address must hold it until the call is over.
"""

from __future__ import annotations

import threading

import torch

_MOST = 2**20  # bytes that a thread keeps


class _Kept(threading.local):
    memory = torch.empty(0, dtype=torch.uint8, device="cpu")


_KEPT = _Kept()


def room(nbytes: int) -> torch.Tensor:
    """At least so many bytes, uint8, for the calling thread's next kernel call, and no longer than that."""
    if nbytes > _MOST:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if len(_KEPT.memory) < nbytes:
        _KEPT.memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return _KEPT.memory
