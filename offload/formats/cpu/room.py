"""Memory that a kernel needs for one call, kept for the next: to allocate it takes longer than small products.

Calls of one thread come one after the other, so each thread has one piece, and one for calls that go on meanwhile. What
is too large to be kept lives as long as the caller holds it: who takes its address must hold it until the call is over.
"""

from __future__ import annotations

import threading

import torch

_MOST = 2**20  # bytes that a thread keeps


class _Kept(threading.local):
    of_call = of_begun = torch.empty(0, dtype=torch.uint8, device="cpu")


_KEPT = _Kept()


def room(nbytes: int, *, begun: bool = False) -> torch.Tensor:
    """At least so many bytes, uint8, for the calling thread's next kernel call, and no longer than that.

    A call that is `begun` (`offload.formats.cpu.begun`) has a piece of its own, since others come before its end.
    """
    kept = _KEPT.of_begun if begun else _KEPT.of_call
    if nbytes <= len(kept):
        return kept
    memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if nbytes <= _MOST and begun:
        _KEPT.of_begun = memory
    elif nbytes <= _MOST:
        _KEPT.of_call = memory
    return memory
