"""One line on standard error, as this program says things: "offload: ..."."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from cache.errors import OffloadError
from offload.system.text import one_line, printable

_LONGEST = 1500
"""Characters of a line; a file that is quoted may have millions."""


def notice(message: object) -> None:
    """Print "offload: ..."; line breaks in `message` become spaces, other control characters are left out.

    The middle of what is too long to be read is left out, too. What cannot be written is not said.
    """
    text = one_line(printable(str(message)))
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    with contextlib.suppress(OSError):  # a full disk, say: there is nowhere else to say it
        print(f"offload: {text}", file=sys.stderr, flush=True)


def error(message: object) -> None:
    """Print "offload: error: ..."; what the operating system refused begins with the file."""
    notice(f"error: {_refused(message) if isinstance(message, OSError) else message}")


def warning(message: object) -> None:
    """Print "offload: warning: ..."."""
    notice(f"warning: {message}")


def _refused(error: OSError) -> str:
    name = error.filename
    if not isinstance(name, str | os.PathLike) or error.filename2 is not None or error.strerror is None:
        return str(error)
    what, folder = error.strerror.lower(), Path(name).parent
    if isinstance(error, FileNotFoundError):
        what = "no such file" if folder.is_dir() else f"no such file, nor a folder {folder}"
    return f"{os.fspath(name)}: {what}{_of_the_cache(Path(name))}"


def _of_the_cache(path: Path) -> str:
    """What to do, where `path` is of a cache folder that cannot be used; else nothing."""
    from offload.system.paths import cache_dir  # brings platformdirs, for which no start should wait

    try:
        kept, path = cache_dir().absolute(), path.absolute()
        usable = (kept.is_dir() and os.access(kept, os.W_OK)) or path.is_dir()
    except (OffloadError, OSError):  # the working directory is gone, or a folder on the way may not be entered
        return ""
    if usable or not (path.is_relative_to(kept) or kept.is_relative_to(path)):
        return ""
    return f" (offload keeps its files in {kept}: set OFFLOAD_CACHE to a folder that you may write to)"
