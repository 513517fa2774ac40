"""What a model says beside its answer, on standard error: its thinking, and the tools that it calls."""

from __future__ import annotations

import sys
from typing import Any

from offload.talk.channels import Kind, Piece
from offload.terminal.console import printable, stderr


class Asides:
    """Shows the pieces of a reply that are no answer, each kind in lines of its own.

    Thinking is dimmed and labelled if it is to be `shown`; otherwise the spinner `status` says that the model thinks.
    """

    def __init__(self, status: Any, shown: bool) -> None:
        self._status = status
        self._shown = shown
        self._console = stderr()
        self._open: Kind | None = None  # what the line that is being written belongs to

    def __enter__(self) -> Asides:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open == "thinking":
            self._end_line()

    def before_answer(self, piece: str) -> None:
        """The answer goes on with `piece`."""
        self._status.stop()
        if self._open != "answer":
            self._end_line()
        self._open = None if piece.endswith("\n") else "answer"

    def show(self, piece: Piece) -> None:
        """Shows a piece of thinking or the call of a tool."""
        if piece.kind == "thinking" and not self._shown:
            self._status.update("thinking")
            return
        self._status.stop()
        if piece.kind == "tool":
            self._end_line()
            self._dim(f"(it calls a tool: {piece.text})\n")
            return
        if self._open != "thinking":
            self._end_line()
            self._open = "thinking"
            self._dim("(thinking) ")
        self._dim(piece.text)

    def _end_line(self) -> None:
        if self._open is not None:
            self._console.print()
        self._open = None

    def _dim(self, text: str) -> None:
        self._console.print(printable(text), style="dim", end="", soft_wrap=True)
        sys.stderr.flush()
