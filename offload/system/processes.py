"""Other processes of this program, which compute: their errors come here as one line, too."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from cache.errors import OffloadError, PolicyError
from offload.system import quiet
from offload.system.text import summary
from offload.system.whose import culprit

T = TypeVar("T")


class Processes:
    """So many processes of their own: a copy of this one would inherit its threads' locks."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def submit(self, work: Callable[..., T], *arguments: Any, **words: Any) -> Future[T]:
        """Has one of them call `work`. What that raises comes out of the future; a part of the user's own is named."""
        with _deaf():  # it starts processes, which would tell of a Ctrl-C while they begin
            return self._pool.submit(_call, work, arguments, words)


@contextmanager
def processes(count: int) -> Iterator[Processes]:
    """`count` processes; what has not begun when the block ends is dropped.

    Raises OffloadError if one of them was killed.
    """
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_prepare) as pool:
        try:
            yield Processes(pool)
        except BrokenProcessPool as error:
            raise OffloadError(
                "a process that computed was killed, perhaps for want of memory: free some, or use fewer processes"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    """Begins such a process. Ctrl-C reaches all processes of the program: it is enough if one of them says so."""
    quiet.prepare()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, in this thread and in processes that it starts until `_prepare`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _call(work: Callable[..., T], arguments: tuple[Any, ...], words: dict[str, Any]) -> T:
    try:
        return work(*arguments, **words)
    except OffloadError:
        raise
    except Exception as error:
        told = summary(error)
        if part := culprit(error):
            raise PolicyError(f"{part} raised {told}") from error
        if not _travels(error):
            raise RuntimeError(told) from error
        raise


def _travels(error: Exception) -> bool:
    """Whether `error` can be sent to another process and read there."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class may do anything
        return False
    return True
