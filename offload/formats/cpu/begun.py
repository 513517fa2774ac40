"""One call of a kernel that goes on while Python does something else.

Whoever reads what it writes waits for it first, by `wait`, or by a kernel that waits by itself (`token_sublayer`). So a
token's experts are computed while their event is noted down, and while the next layer's call is made ready.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.native import library


class _Held(threading.local):
    all: tuple[Any, ...] = ()


_HELD = _Held()
"""What the latest call that this thread began reads and writes."""


def begin(function: str, told: bytes, *held: Any) -> None:
    """Begin a call of the library's `function`, once the one before is done.

    `told` and `held` are kept: at least until the thread that began it waits, or begins another one.
    """
    lib = library()
    assert lib is not None
    lib.pool_begin(_address(function), told, own_threads.count())
    _HELD.all = (told, *held)


def wait() -> None:
    """Until what was begun is done."""
    if _HELD.all:
        lib = library()
        assert lib is not None
        lib.pool_wait()
        _HELD.all = ()


def is_under_way() -> bool:
    """Whether this thread has begun a call that it has not waited for."""
    return bool(_HELD.all)


def lasted_s() -> float:
    """How long the latest call took that is done."""
    lib = library()
    assert lib is not None
    lasted_ns: int = lib.pool_lasted_ns()
    return lasted_ns / 1e9


@functools.cache
def _address(function: str) -> ctypes.c_void_p:
    return ctypes.cast(getattr(library(), function), ctypes.c_void_p)
