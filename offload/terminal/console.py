"""The terminal: what is printed where, spinners, and text that is safe to show.

Answers go to standard output, everything about them to standard error.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from offload.system.messages import notice
from offload.system.text import printable

_PATIENCE_S = 1.0
_ESCAPED = {code: f"\\u{code:04x}" for code in range(127, 160)}


class _Plain(Console):
    """Shows text as it is, without control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def stderr() -> Console:
    """A console on standard error, where everything but the answer goes."""
    return _Plain(stderr=True)


def answers() -> Console:
    """A console on standard output, as wide as it takes where that is not a terminal."""
    return _Plain(width=None if sys.stdout.isatty() else 200)


def print_json(value: object) -> None:
    """One JSON value on standard output, in letters that its encoding has and a terminal does not obey."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False)
    print(text.translate(_ESCAPED))


def dim(message: str) -> None:
    """One quiet line on standard error."""
    stderr().print(message, style="dim", soft_wrap=True)


@contextmanager
def steps(*, lines: bool = False) -> Iterator[Callable[[str], object]]:
    """Shows, on a terminal's standard error, the step told to the function it gives; elsewhere nothing, or a line."""
    if not sys.stderr.isatty():
        yield notice if lines else lambda step: None
        return
    with stderr().status("") as status:
        yield status.update


def piped_text() -> str | None:
    """All of standard input if it is not a terminal, saying so if that takes a while; else None."""
    if sys.stdin.isatty():
        return None
    if os.name == "posix" and not select.select([sys.stdin], [], [], _PATIENCE_S)[0]:
        notice("waiting for the end of standard input")
    try:
        return sys.stdin.read()
    except OSError as error:
        error.filename = "standard input"
        raise


@contextmanager
def waiting(what: str) -> Iterator[Any]:
    """Shows `what` with a spinner while the block runs, on a terminal; gives it, to be updated or stopped early."""
    with stderr().status(what) as status:
        yield status


class Answer:
    """The answer on standard output, piece by piece; ends its line on exit if anything was written."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._tail = "\n"

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._tail != "\n" and kind is not BrokenPipeError:
            self.write("\n")

    def write(self, text: str) -> None:
        """Shows `text` at once."""
        if text and not self._silent:
            sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
            self._tail = text[-1]
