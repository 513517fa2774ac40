"""Arrays from files that other programs wrote: .npy and .npz without pickles, and tables of numbers in JSON."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import TraceError

_DAMAGE = (ValueError, EOFError, MemoryError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_npy(source: Path | IO[bytes], name: str) -> NDArray[Any]:
    """The array in a .npy file; that of a path is mapped, not read. Raises TraceError and OSError."""
    try:
        if isinstance(source, Path):
            return np.lib.format.open_memmap(source, mode="r")
        return np.asarray(np.lib.format.read_array(source, allow_pickle=False))
    except _DAMAGE as error:
        raise TraceError(f"{name} is no .npy file that can be read without pickle: {error}") from error


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays in a .npz file. Raises TraceError and OSError."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            found = {}
            for name in names:
                with archive.open(name) as member:
                    found[name.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
    except _DAMAGE as error:
        raise TraceError(f"{path} is no .npz file that can be read without pickle: {error}") from error
    return found


def whole_number(value: Any, name: str) -> int:
    """`value`, a number or an array of one, as an integer from 0. Raises TraceError."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu" or int(array.item()) < 0:
        raise TraceError(f"{name} is {str(value)[:40]}, not a whole number from 0")
    return int(array.item())


def table_of_ids(value: Any, dimensions: int, name: str) -> NDArray[np.int64]:
    """`value`, an array or nested lists, as integers of so many dimensions. Raises TraceError."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise TraceError(f"{name} has rows of different lengths") from error
    if array.dtype.kind not in "iu":
        raise TraceError(f"{name} holds {_kind(array)}, where expert ids are expected")
    if array.ndim != dimensions:
        raise TraceError(f"{name} has the shape {list(array.shape)}, not {dimensions} dimensions")
    return array.astype(np.int64)


def _kind(array: NDArray[Any]) -> str:
    return "nothing" if not array.size else "more than numbers" if array.dtype.kind == "O" else str(array.dtype)
