"""Checkpoints that are made of package data in the user's cache folder, once: whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from cache.errors import DiskSpaceError, UnknownModelError
from offload.system.paths import cache_dir, exclusive, fsync_folder
from offload.system.sizes import format_bytes

_MANIFEST = "offload-demo.json"  # name -> bytes of every file; the last one written


def built(name: str, fingerprint: str, needed: int, build: Callable[[Path, Path], None], *, progress: bool) -> Path:
    """The folder of `name` in the cache folder; if it is not there, or not whole, `build(folder, scratch)` fills it
    first, which has another folder for what it needs meanwhile.

    Another process that builds it is waited for. A build that was killed is cleaned up and done again. Raises
    UnknownModelError when the cache folder cannot be written, DiskSpaceError before anything is written when fewer than
    `needed` bytes are free.
    """
    folder = cache_dir() / f"{name}-{fingerprint}"
    try:
        if _is_whole(folder):
            return folder
        with exclusive(cache_dir() / f"{name}.lock", (lambda: _say_waiting(name)) if progress else None):
            if not _is_whole(folder):
                _build(folder, name, needed, build)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskSpaceError(f"the disk under {cache_dir()} filled up: free {format_bytes(needed)}") from error
        raise UnknownModelError(
            f"the {name} cannot be built under {cache_dir()} ({error.strerror}): set OFFLOAD_CACHE elsewhere"
        ) from error
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether every file that the build wrote is there at its full size."""
    try:
        files: dict[str, int] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False


def _build(folder: Path, name: str, needed: int, build: Callable[[Path, Path], None]) -> None:
    """Build `folder` inside a sibling and move it out. The caller holds the lock."""
    for leftover in cache_dir().glob(f"{name}-*.building"):
        shutil.rmtree(leftover)
    shutil.rmtree(folder, ignore_errors=True)  # one that is not whole
    free = shutil.disk_usage(cache_dir()).free
    if free < needed:
        raise DiskSpaceError(
            f"the {name} needs {format_bytes(needed)} under {cache_dir()}, {format_bytes(free)} are free: "
            "free some or set OFFLOAD_CACHE to another disk"
        )
    with TemporaryDirectory(".building", f"{name}-", cache_dir(), ignore_cleanup_errors=True) as scratch:
        building = Path(scratch, "checkpoint")
        building.mkdir()
        build(building, Path(scratch))
        _seal(building)
        building.replace(folder)
        fsync_folder(folder.parent)


def _seal(folder: Path) -> None:
    """Note what is in `folder`, and have all of it on the disk."""
    manifest = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)


def _say_waiting(name: str) -> None:
    print(f"another process builds the {name}: waiting for it", file=sys.stderr)
