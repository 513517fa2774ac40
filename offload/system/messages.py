"""One line on standard error, as this program says things: "offload: ..."."""

from __future__ import annotations

import sys


def notice(message: object) -> None:
    """Print "offload: ..."; line breaks in `message` become spaces."""
    print(f"offload: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def error(message: object) -> None:
    """Print "offload: error: ..."."""
    notice(f"error: {message}")


def warning(message: object) -> None:
    """Print "offload: warning: ..."."""
    notice(f"warning: {message}")
