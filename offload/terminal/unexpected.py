"""Errors that nobody foresaw: one line for the user, and the traceback in a file for who mends them."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from offload.system import messages
from offload.system.paths import cache_dir
from offload.system.text import summary
from offload.system.whose import place
from offload.terminal.flags import State

_KEPT = 20


def report(error: BaseException) -> None:
    """Says in one line what failed, and where in this program; keeps the traceback in the cache folder."""
    try:
        kept = f"please report it with its traceback, which is in {_keep(error)}"
    except Exception as refused:  # whatever keeps a file from being written must not hide the error
        kept = f"please report it with the traceback that --debug shows (it could not be kept: {refused})"
    messages.error(f"unexpected {summary(error)} ({place(error)}): {kept}")


@contextmanager
def in_threads(state: State) -> Iterator[None]:
    """Inside, an error that ends a thread is told like this, too."""
    before = threading.excepthook

    def tell(ended: threading.ExceptHookArgs) -> None:
        if state.debug or not isinstance(ended.exc_value, Exception):
            before(ended)
        else:
            report(ended.exc_value)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = before


def _keep(error: BaseException) -> Path:
    """Writes the traceback, and what it happened with; forgets all but the last ones. Raises OSError."""
    folder = cache_dir() / "tracebacks"
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("*.txt"))[: 1 - _KEPT]:
        old.unlink(missing_ok=True)
    path = folder / time.strftime(f"%Y-%m-%d-%H%M%S-{os.getpid()}-{threading.get_ident()}.txt")
    about = ", ".join(f"{name} {_version(name)}" for name in ("offload", "torch", "transformers"))
    path.write_text(
        f"{about}, Python {platform.python_version()}, {platform.platform()}\n{sys.argv[1:]}\n\n"
        + "".join(traceback.format_exception(type(error), error, error.__traceback__)),
        encoding="utf-8",
        errors="backslashreplace",
    )
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
