"""Errors that nobody foresaw: one line for the user, and the traceback in a file for who mends them."""

from __future__ import annotations

import os
import platform
import re
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
from offload.terminal.flags import State

_OURS = tuple(f"{package}{os.sep}" for package in ("offload", "cache", "predictors"))
_KEPT = 20
_FRAME = re.compile(r'File "(.+?)", line ([0-9]+)')


def report(error: BaseException) -> None:
    """Says in one line what failed, and where in this program; keeps the traceback in the cache folder."""
    try:
        kept = f"please report it with its traceback, which is in {_keep(error)}"
    except Exception as refused:  # whatever keeps a file from being written must not hide the error
        kept = f"please report it with the traceback that --debug shows (it could not be kept: {refused})"
    messages.error(f"unexpected {summary(error)} ({_place(error)}): {kept}")


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


def _place(error: BaseException) -> str:
    """The file and line of this program that was reached last, else of whatever was."""
    frames = list(_frames(error)) or [("no place", "?")]
    ours = [frame for frame in frames if frame[0].startswith(_OURS)]
    return ":".join((ours or frames)[-1])


def _frames(error: BaseException) -> Iterator[tuple[str, str]]:
    """File and line of each call that was under way, the files of this program as they are in its repository."""
    remote = str(error.__cause__) if type(error.__cause__).__name__ == "_RemoteTraceback" else ""  # of another process
    found = _FRAME.findall(remote.partition("\nThe above exception")[0]) or [
        (file, str(line)) for file, line, *_ in traceback.extract_tb(error.__traceback__)
    ]
    root = Path(__file__).parents[2]
    for file, line in found:
        yield str(Path(file).relative_to(root) if Path(file).is_relative_to(root) else file), line


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
