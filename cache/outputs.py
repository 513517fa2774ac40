"""Files that users name for a result: refused before the work begins, else put in place at once and whole.

A link stands for the file that it points to, which may not be there yet. What is no file stays what it is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cache.errors import DiskSpaceError, OffloadError, OutputError


def target(path: str | os.PathLike[str]) -> Path:
    """The file that `path` stands for. Raises OSError."""
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_output(path: str | os.PathLike[str]) -> None:
    """Raises OutputError where no file can be put at `path`. Call it before the work whose result the file will hold.

    Side effect: a file is made beside it, and removed.
    """
    with writing(path):
        found = target(path)
        if found.is_dir():
            raise OutputError(f"{path} is a folder: name a file in it")
        if os.path.lexists(found) and not found.is_file():
            raise OutputError(f"{path} is no regular file, which a result would replace: choose another name")
        check_parent(found)
        if found.is_file() and not os.access(found, os.W_OK):
            raise OutputError(f"{path} may not be written to: choose another name")
        try:
            _partial(found).open("wb").close()
        finally:
            with suppress(OSError):
                _partial(found).unlink()


def check_parent(path: str | os.PathLike[str]) -> None:
    """Raises OutputError if the folder that `path` is to lie in is none."""
    folder = Path(path).parent
    if not folder.is_dir():
        said = f"{folder} is no folder" if os.path.lexists(folder) else f"there is no folder {folder}"
        raise OutputError(f"{path} cannot be written: {said}: make it, or choose another place")


@contextmanager
def output(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file that is put at `path` when the block ends, whole and durable; after an error what was there stays.

    Raises OutputError as `check_output` does, and DiskSpaceError.
    """
    check_output(path)
    with writing(path):
        partial = _partial(target(path))
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target(path))
        finally:
            with suppress(OSError):
                partial.unlink()


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, what the operating system refuses is an OutputError or DiskSpaceError that names `path`."""
    try:
        yield
    except OSError as error:
        raise refusal(path, error) from error


def refusal(path: str | os.PathLike[str], error: OSError) -> OffloadError:
    """What to say of `error`, which came while `path` was written."""
    said = f"{os.fspath(path)} cannot be written: {(error.strerror or str(error)).lower()}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskSpaceError(f"{said}: make room, or choose another place")
    return OutputError(f"{said}: choose another place")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
