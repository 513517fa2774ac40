"""Git LFS pointers: the few lines that a clone without git-lfs leaves in place of a large file."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from cache.errors import CheckpointError

_BEGINNING = b"version https://git-lfs.github.com/spec/"
_LONGEST = 1024
"""Bytes of a pointer, by its specification."""


def is_pointer(prefix: bytes) -> bool:
    """Whether a file that begins with `prefix`, at least 8 bytes, is a pointer. As a header's length it is absurd."""
    return prefix[: len(_BEGINNING)] == _BEGINNING[: len(prefix)]


def pointer(file: str) -> str:
    """What to say of a file that is one."""
    return f"{file}: only a Git LFS pointer to the file: run `git lfs pull` in its folder"


def refuse_pointers(folder: Path, patterns: Iterable[str]) -> None:
    """Raises CheckpointError if a file in `folder` that fits one of `patterns` is a pointer."""
    wanted = tuple(patterns)
    for path in sorted(folder.iterdir()):
        if any(fnmatchcase(path.name, pattern) for pattern in wanted) and path.is_file():
            with path.open("rb") as file:
                beginning = file.read(len(_BEGINNING))
            if beginning == _BEGINNING and path.stat().st_size <= _LONGEST:
                raise CheckpointError(pointer(str(path)))
