"""What the process is set to as a program of the terminal: libraries are quiet, our own warnings are one line each."""

from __future__ import annotations

import _thread
import logging
import os
import sys
import warnings
from typing import TextIO

from offload.system import messages
from offload.system.streams import prepare_streams

_OURS = r"(offload|cache|predictors)(\.|$)"
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def prepare() -> None:
    """Sets this process up as a terminal program; once, before transformers is imported.

    Keeps libraries' warnings, logs and progress bars off the terminal, unless environment variables or
    `python -W` ask for them; our own warnings become one line each. What a stream cannot encode is replaced.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("offload").addHandler(_WarningLines(logging.WARNING))
    if not sys.warnoptions:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("default", module=_OURS)
        warnings.showwarning = _show_warning
    sys.unraisablehook = _deliver_interrupt
    prepare_streams()


class _WarningLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        messages.warning(record.getMessage())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    messages.warning(message)


def _deliver_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Ctrl-C that came while a finalizer ran would be lost there: it comes again, now. Other errors there are told."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _thread.interrupt_main()
    else:
        told = f"{unraisable.exc_type.__name__}: {unraisable.exc_value}"
        messages.warning(f"{told} ({unraisable.err_msg or 'ignored in'} {unraisable.object!r})")
