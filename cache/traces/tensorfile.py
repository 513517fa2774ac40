"""Files of named arrays, in the safetensors container: read as memory maps, written block by block.

A file is 8 bytes with the length of the header (little-endian), the header as JSON (for each array its dtype, shape and
byte range; text metadata under `__metadata__`), and then the arrays' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cache.errors import TraceError
from cache.outputs import output

_DTYPES = {
    "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?",
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100 * 2**20  # as safetensors itself has it
BLOCK_BYTES = 8 * 2**20  # read or written at once


@dataclass(frozen=True)
class Column:
    """An array to be written: its dtype and shape, and its rows as one array or as blocks that follow each other."""

    dtype: DTypeLike
    shape: tuple[int, ...]
    blocks: Iterable[NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def row_blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """`array` along its first axis, a few megabytes at a time."""
    rows = max(1, BLOCK_BYTES * len(array) // max(array.nbytes, 1))
    return (array[start : start + rows] for start in range(0, len(array), rows))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Every array of a safetensors file, as read-only views of the mapped file, and its metadata.

    Reads the header only. Raises TraceError for a file that is no safetensors file, cut short or inconsistent, and
    OSError for one that cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise TraceError(f"{path} is not a safetensors file, or was cut short: {size} bytes, no header")
        header = _parse(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TraceError(f"{path}: the metadata in its header is not a table of texts")
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    begin = 8 + length
    end = 0
    for name, (dtype, shape, first, last) in sorted(entries.items(), key=lambda item: item[1][2]):
        if first != end or last - first != math.prod(shape) * dtype.itemsize:
            raise TraceError(f'{path}: the bytes {first} to {last} of "{name}" are not what its shape {shape} takes')
        end = last
    if begin + end != size:
        kind = "was cut short" if begin + end > size else "has bytes that belong to nothing"
        raise TraceError(f"{path} {kind}: {size} bytes, its header speaks of {begin + end}")
    mapped = np.asarray(np.memmap(path, np.uint8, "r"))
    return {
        name: mapped[begin + first : begin + last].view(dtype).reshape(shape)
        for name, (dtype, shape, first, last) in entries.items()
    }, metadata


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise TraceError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise TraceError(f"{path} is not a safetensors file: its header is not a table")
    return header


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """dtype, shape, and byte range of one array of the header."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
    except (KeyError, TypeError, ValueError):
        numbers = [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TraceError(f'{path}: the entry of "{name}" in its header is damaged')
    if dtype not in _DTYPES:
        raise TraceError(f'{path}: "{name}" has dtype {dtype}, which no trace has')
    return np.dtype(_DTYPES[dtype]), tuple(shape), first, last


def write_tensors(path: str | os.PathLike[str], columns: Mapping[str, Column], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically: until all is on disk, what was at `path` stays.

    Holds one block in memory at a time. Raises ValueError if blocks are not what their column's shape says, and
    OutputError and DiskSpaceError.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # The widest first, and a header of a multiple of 8 bytes: so every array lies aligned.
    ordered = sorted(columns.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize)
    for name, column in ordered:
        dtype = _NAMES[np.dtype(column.dtype)]
        header[name] = {
            "dtype": dtype,
            "shape": list(column.shape),
            "data_offsets": [end, end + column.nbytes],
        }
        end += column.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with output(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, column in ordered:
            written = 0
            for block in column.blocks:
                data = np.ascontiguousarray(block, column.dtype)
                file.write(data.data)
                written += data.nbytes
            if written != column.nbytes:
                raise ValueError(f"{name}: {written} bytes for a shape of {column.shape}")
