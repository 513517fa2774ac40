"""One line on standard error, as this program says things: "offload: ..."."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from offload.system.printable import printable


def notice(message: object) -> None:
    """Print "offload: ..."; line breaks in `message` become spaces, other control characters are left out."""
    print(f"offload: {' '.join(printable(str(message)).split())}", file=sys.stderr, flush=True)


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
    if not isinstance(error, FileNotFoundError):
        return f"{os.fspath(name)}: {error.strerror.lower()}"
    folder = Path(name).parent
    return f"{os.fspath(name)}: no such file" + ("" if folder.is_dir() else f", nor a folder {folder}")
