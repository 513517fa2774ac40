"""What one kind of worker has to do: urgent jobs first, each kind in the order of its coming."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Channel(Generic[Job]):
    """A queue of jobs between threads, of which some are urgent. Every method may be called on every thread."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._urgent: deque[Job] = deque()
        self._others: deque[Job] = deque()
        self._closed = False

    def put(self, jobs: Sequence[Job], *, urgent: bool, first: bool = False) -> None:
        """Add jobs, behind those of their kind, or before them; once it is closed they are dropped."""
        with self._ready:
            if self._closed:
                return
            line = self._urgent if urgent else self._others
            if first:
                line.extendleft(reversed(jobs))
            else:
                line.extend(jobs)
            self._ready.notify(len(jobs))

    def get(self, *, wait: bool = True) -> Job | None:
        """Wait for the next job; None once the channel is closed.

        Without `wait`, None also when there is no job now.
        """
        with self._ready:
            while wait and not self._urgent and not self._closed and not self._others:
                self._ready.wait()
            if self._urgent:
                return self._urgent.popleft()
            return self._others.popleft() if self._others else None

    def hurry(self, which: Callable[[Job], bool]) -> None:
        """Those of the others that match are urgent from now on."""
        with self._ready:
            self._urgent.extend(job for job in self._others if which(job))
            self._others = deque(job for job in self._others if not which(job))

    def withdraw(self, which: Callable[[Job], bool], count: int) -> bool:
        """Take back those of the others that match, if they are `count`: else a worker has some already."""
        with self._ready:
            left = deque(job for job in self._others if not which(job))
            if len(self._others) - len(left) != count:
                return False
            self._others = left
            return True

    def close(self) -> None:
        """No more jobs, those that nobody has begun are dropped: workers stop."""
        with self._ready:
            self._closed = True
            self._urgent.clear()
            self._others.clear()
            self._ready.notify_all()
