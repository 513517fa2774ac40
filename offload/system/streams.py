"""Standard streams that may be closed or full: what is lost of an answer is an error, of what is said beside it not.

A program may be started without them. Its first files would get their numbers, and what libraries print would be
written into these: so the numbers are taken here.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

OUTPUT = "standard output"


def prepare_streams() -> None:
    """Gives this process its three streams, whatever it was started with; what they cannot encode is replaced."""
    while (taken := os.open(os.devnull, os.O_RDONLY)) <= 2:  # to write there is an error, as it is where all is closed
        pass
    os.close(taken)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - at its end from the start
    if sys.stdout is None or _is_plain(sys.stdout):
        sys.stdout = _text(_Answers(1, "w", closefd=False), sys.stdout)
    if sys.stderr is None or _is_plain(sys.stderr):
        sys.stderr = _text(_Asides(2, "w", closefd=False), sys.stderr)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _Answers(io.FileIO):
    """Where answers go: what cannot be written is an error that says where."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = OUTPUT
            if error.errno == errno.EBADF:
                error.strerror = "it is closed"
            raise


class _Asides(io.FileIO):
    """Where all else goes: what cannot be written is not said."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _is_plain(stream: object) -> bool:
    """Whether it is as Python made it, and nobody has put another one in its place."""
    return type(stream) is io.TextIOWrapper and type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO


def _text(file: io.FileIO, before: TextIO | None) -> io.TextIOWrapper:
    if not isinstance(before, io.TextIOWrapper):
        return io.TextIOWrapper(io.BufferedWriter(file), line_buffering=True)
    before.flush()
    at_once = before.line_buffering or before.write_through
    return io.TextIOWrapper(io.BufferedWriter(file), before.encoding, line_buffering=at_once)
