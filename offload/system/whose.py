"""Whose error it is: this program's, a library's, or a part's of the user's own. The calls under way tell it."""

from __future__ import annotations

import os
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cache.registry import imported_as

_OURS = tuple(f"{package}{os.sep}" for package in ("offload", "cache", "predictors"))
_ROOT = Path(__file__).parents[2]
_REMOTE = re.compile(r'File "(.+?)", line ([0-9]+)')


@dataclass(frozen=True)
class Call:
    """One call that was under way: of a file of this program as it is in its repository, of another as it is here.

    module, owner: the module, and the class of the method's object; not known of other processes.
    """

    file: str
    line: int
    module: str = ""
    owner: type[Any] | None = None

    @property
    def ours(self) -> bool:
        """Whether it is this program's."""
        return self.file.startswith(_OURS)


def calls(error: BaseException) -> list[Call]:
    """What was under way when `error` was raised, the innermost call last; also if another process sent it."""
    cause = error.__cause__
    remote = str(cause).partition("\nThe above exception")[0] if type(cause).__name__ == "_RemoteTraceback" else ""
    return [Call(_short(file), int(line)) for file, line in _REMOTE.findall(remote)] or [
        Call(_short(frame.f_code.co_filename), line, _module(frame), type(frame.f_locals.get("self")))
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]


def place(error: BaseException) -> str:
    """The file and line of this program that was reached last, else of whatever was."""
    found = calls(error)
    ours = [call for call in found if call.ours]
    return "{0.file}:{0.line}".format((ours or found)[-1]) if found else "no place"


def culprit(error: BaseException) -> str | None:
    """Which part of the user's own raised `error`, as messages call it; None if it was none of them."""
    names = [name for call in calls(error) if (name := imported_as(call.owner))]
    return names[-1] if names else None


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _short(file: str) -> str:
    return str(Path(file).relative_to(_ROOT)) if Path(file).is_relative_to(_ROOT) else file
