"""Where offload keeps what it builds and downloads, and the lock that lets one process at a time build it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.2


def cache_dir() -> Path:
    """The user's cache folder for offload; it may not exist yet.

    $OFFLOAD_CACHE, else $XDG_CACHE_HOME/offload, else ~/.cache/offload; on Windows %LOCALAPPDATA%\\offload
    takes the second place.
    """
    if chosen := os.environ.get("OFFLOAD_CACHE"):
        return Path(chosen).expanduser()
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / ".cache") / "offload"


def machine_profile_path() -> Path:
    """Where `offload profile` stores what it measured of this machine; it may not exist yet."""
    return cache_dir() / "machine.json"


def calibration_path(fingerprint: str) -> Path:
    """Where `offload calibrate` stores what it measured of the model with that fingerprint; it may not exist yet."""
    return cache_dir() / "calibrations" / f"{fingerprint}.safetensors"


@contextmanager
def exclusive(path: Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock file `path` (created, with its folder, and left in place) for the length of the block.

    The operating system drops the lock when its process ends, however it ends, so a killed process leaves
    nothing stuck. Blocks while another process holds it; `waiting` is called once when that happens.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(handle):
            if waiting is not None:
                waiting()
            while not _try_lock(handle):
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(handle)  # releases the lock


def _try_lock(handle: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:  # what Windows says of a range that another process has locked
            return False
    else:
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the operating system can (not on Windows)."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
