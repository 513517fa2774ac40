"""A module that computes otherwise: its class with one of ours before it, so that all else stays what it was."""

from __future__ import annotations

import functools
from typing import Any

_ORIGINAL = "_offload_original"


@functools.cache
def with_ours(ours: Any, cls: Any) -> Any:
    """The class of modules that ask `ours` before `cls`. It has the name of `cls`."""
    return type(cls.__name__, (ours, cls), {"__module__": cls.__module__, _ORIGINAL: cls})


def original(cls: Any) -> Any:
    """The class that was there before `with_ours`, however often that was."""
    while _ORIGINAL in vars(cls):
        cls = vars(cls)[_ORIGINAL]
    return cls
