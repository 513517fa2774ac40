"""The `offload` program: runs a command line, and ends what a user can cause as one line and an exit code.

Imports next to nothing before `main` runs, so that Ctrl-C is met from the start.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from cache.errors import OffloadError

MISTAKE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, 2 for a user's error, 130 if interrupted, 141 if nobody reads the output.

    With `--debug` the errors pass through, for their traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    state = None
    try:
        from offload.options import State
        from offload.terminal import app as commands
        from offload.terminal import console as terminal

        terminal.prepare()
        state = State()
        code = commands.run(arguments, state)
    except (OffloadError, OSError, MemoryError, KeyboardInterrupt) as error:
        if state is not None and state.debug:
            raise
        code = _end(error)
    sys.exit(code)


def _end(error: BaseException) -> int:
    """Says what happened, and gives the exit code."""
    if isinstance(error, OSError):
        # Python would meet the same error again when it flushes what is still buffered at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    if isinstance(error, KeyboardInterrupt):
        print("offload: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"offload: error: {message}", file=sys.stderr, flush=True)
    return MISTAKE
