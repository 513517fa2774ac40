"""Ctrl-C between two forward passes, not inside one: a pass cut in half can leave a transfer that nobody receives."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back() -> Iterator[None]:
    """A KeyboardInterrupt in the block is raised at its end; the second one at once, as the block may not end.

    Whatever handles Ctrl-C hears of it at once, only what it raises waits. Does nothing where Ctrl-C is ignored, and
    outside of the main thread, the only one it reaches.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[KeyboardInterrupt] = []

    def hold(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except KeyboardInterrupt as interrupt:
            if held:
                raise
            held.append(interrupt)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            raise held[0]
