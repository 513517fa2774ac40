"""The `offload` program: runs a command line, and ends what a user can cause as one line and an exit code.

Imports next to nothing before `main` runs, so that Ctrl-C is met from the start.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from cache.errors import OffloadError
from offload.system import messages
from offload.terminal.exits import BROKEN_PIPE, INTERRUPTED, MISTAKE, UNEXPECTED


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, 2 for a user's error, 130 if interrupted, 141 if nobody reads the output.

    An error in a part of the user's own is a user's error; one that nobody foresaw ends with 1. With `--debug` all of
    them pass through, for their traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    state = None
    try:
        from offload.checkpoint.hub.variables import check_before_import
        from offload.system import instructions, quiet
        from offload.terminal import app
        from offload.terminal.flags import State
        from offload.terminal.unexpected import in_threads

        quiet.prepare()
        state = State()
        with in_threads(state):
            check_before_import()
            instructions.asked()
            code = app.run(arguments, state)
    except SystemExit as leaving:
        if not isinstance(leaving.__context__, BrokenPipeError):  # which rich leaves with a code of its own
            raise
        code = BROKEN_PIPE
    except BaseException as error:  # a library in Rust raises what is no Exception
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
        messages.notice("interrupted")
        return INTERRUPTED
    if isinstance(error, OffloadError | OSError | MemoryError):
        messages.error(error if str(error).strip() else type(error).__name__)
        return MISTAKE
    from offload.system.text import summary
    from offload.system.whose import culprit
    from offload.terminal.unexpected import report

    if part := culprit(error):
        messages.error(f"{part} raised {summary(error)}")
        return MISTAKE
    report(error)
    return UNEXPECTED
