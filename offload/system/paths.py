"""Where offload keeps what it builds and downloads, and the lock that lets one process at a time build it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from cache.errors import OffloadError


def cache_dir() -> Path:
    """The user's cache folder for offload; it may not exist yet.

    $OFFLOAD_CACHE, else where programs keep such things: $XDG_CACHE_HOME/offload, else ~/.cache/offload; by default
    ~/Library/Caches/offload on macOS, and %LOCALAPPDATA%\\offload on Windows. Raises OffloadError where there is none.
    """
    chosen = os.environ.get("OFFLOAD_CACHE")
    try:
        return Path(chosen or platformdirs.user_cache_path("offload", appauthor=False, opinion=False)).expanduser()
    except RuntimeError as error:  # "~" of a user who has no home
        raise OffloadError(
            f"there is no home folder for offload's files ({chosen or '~'}): set OFFLOAD_CACHE to a folder that you "
            "may write to"
        ) from error


def machine_profile_path() -> Path:
    """Where `offload profile` stores what it measured of this machine; it may not exist yet."""
    return cache_dir() / "machine.json"


def calibration_path(fingerprint: str) -> Path:
    """Where `offload calibrate` stores what it measured of the model with that fingerprint; it may not exist yet."""
    return cache_dir() / "calibrations" / f"{fingerprint}.safetensors"


def uses_path(fingerprint: str) -> Path:
    """Where it is kept how often the model with that fingerprint used each expert; it may not exist yet."""
    return cache_dir() / "calibrations" / f"{fingerprint}.uses.safetensors"


def own_place(path: Path) -> Path:
    """`path`, of a file in the cache folder, once its folder is there. Raises OSError where it cannot be written to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return path


@contextmanager
def exclusive(path: Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock file `path` (created, with its folder, and left in place) for the length of the block.

    The operating system drops the lock when its process ends, however it ends, so a killed process leaves
    nothing stuck. Blocks while another process holds it; `waiting` is called once when that happens.
    """
    from filelock import FileLock, Timeout  # a tenth of what `offload --help` takes

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if waiting is not None:
            waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the operating system can (not on Windows)."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
