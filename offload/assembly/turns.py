"""Whose turn it is: a model serves one call at a time, in the order in which threads asked."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from cache.errors import BusyError

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    """Lets one thread in at a time, for as long as its call takes; the others wait in the order of their coming."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._holder: int | None = None  # the thread
        self._process = os.getpid()

    @property
    def in_fork(self) -> bool:
        """Whether this process is a fork of the one that loaded the model: none of the model's threads run here."""
        return os.getpid() != self._process

    @contextmanager
    def taken(self, *, wait: bool = True) -> Iterator[None]:
        """A turn of the calling thread's.

        Raises BusyError if it has one already, and without `wait` if another thread has. Raises RuntimeError in a fork.
        """
        if self.in_fork:
            raise RuntimeError(
                f"this model was loaded in process {self._process}, of which this one is a fork, and its threads are "
                'not here: load the model after the fork, or start processes by "spawn"'
            )
        me = threading.get_ident()
        if self._holder == me:
            raise BusyError(
                "the model is in the middle of a call of this very thread, whose streamer, stopping criterion or hook "
                "asks for another one: wait until that call has returned"
            )
        try:
            self._take(me, wait)
            yield
        finally:
            self._give(me)

    @contextmanager
    def for_pass(self) -> Iterator[None]:
        """As `taken`, for a forward pass: in the midst of a turn of its thread's it is a part of that."""
        if self._holder == threading.get_ident() and not self.in_fork:
            yield
            return
        with self.taken():
            yield

    def around(self, manager: AbstractContextManager[T]) -> AbstractContextManager[T]:
        """`manager`, entered and left in a turn each; in between other threads have theirs."""
        return _InTurns(self, manager)

    def _take(self, me: int, wait: bool) -> None:
        with self._changed:
            if self._holder is not None or self._waiting:
                if not wait:
                    raise BusyError("the model is busy with another thread's call: try again later, or wait for it")
                place = object()
                self._waiting.append(place)
                try:
                    self._changed.wait_for(lambda: self._holder is None and self._waiting[0] is place)
                finally:
                    self._waiting.remove(place)
                    self._changed.notify_all()  # if Ctrl-C ended the wait, it is somebody else's turn
            self._holder = me

    def _give(self, me: int) -> None:
        with self._changed:
            if self._holder == me:
                self._holder = None
                self._changed.notify_all()


class _InTurns(AbstractContextManager[T]):
    def __init__(self, turns: Turns, manager: AbstractContextManager[T]) -> None:
        self._turns, self._manager = turns, manager

    def __enter__(self) -> T:
        with self._turns.taken():
            return self._manager.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        with self._turns.taken():
            return self._manager.__exit__(kind, error, traceback)


def in_turn(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A method of what has `parts.turns`, in a turn of its own, for which it waits."""

    @wraps(method)
    def taken(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.parts.turns.taken():
            return method(self, *args, **kwargs)

    return taken
