"""Byte ranges of files -> host memory, in large reads.

Where the file system allows it the reads are direct (O_DIRECT): every byte comes from the disk once and none is kept
twice, in the page cache and in ours. Libraries, such as safetensors, map files or read them through that cache. Direct
reads want offsets, lengths and addresses in multiples of 4 KiB. Records of a converted store have them and are read
into place. Tensors in a checkpoint do not, so they land in a small bounce buffer and are copied to their places from
there: a tenth of the time of the read itself, and another thread reads meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import TransferError
from offload.checkpoint.parameter import Piece, align
from offload.system.seen import SeenFile, pread_into

BLOCK = 4096  # bytes; what direct reads are a multiple of
BOUNCE_BYTES = 16 * 2**20  # one read's size at most
PART_BYTES = 2**20  # smaller parts of an expert are not worth a read of their own
GAP_BYTES = 64 * 2**10  # nearer pieces are read in one go

Bytes = NDArray[Any]  # of uint8


class FileReader:
    """Reads byte ranges of files; keeps them open. Not for two threads at once: each has its own.

    Files that are in `seen` must still be what they were then.
    """

    def __init__(
        self, direct: bool = True, bounce_bytes: int = BOUNCE_BYTES, seen: Mapping[str, SeenFile] | None = None
    ) -> None:
        self._seen = seen or {}
        self._direct = direct and hasattr(os, "O_DIRECT") and hasattr(os, "preadv")
        self._files: dict[str, tuple[int, bool]] = {}
        self._bounce_bytes = align(bounce_bytes, BLOCK)
        self._bounce_map: mmap.mmap | None = None
        self._bounce: Bytes = np.empty(0, np.uint8)

    def read(self, pieces: Sequence[Piece], destination: Bytes) -> int:
        """Put every piece at its place in `destination`; returns the bytes read from disk.

        Raises TransferError when a file cannot be read, ends too early, or was changed.
        """
        total = 0
        for run in _runs(pieces):
            file = run[0].file
            try:
                total += self._read_run(file, run, destination)
                if file in self._seen:
                    self._seen[file].check(self._files[file][0])
            except OSError as error:
                raise TransferError(
                    f"reading {file} failed: {error.strerror or error}: is the disk still there?"
                ) from error
        return total

    def close(self) -> None:
        """Close the files and give the bounce buffer back."""
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._bounce = np.empty(0, np.uint8)
        if self._bounce_map is not None:
            # A view held by an exception's traceback keeps the map alive; it goes with that.
            with contextlib.suppress(BufferError):
                self._bounce_map.close()
            self._bounce_map = None

    def _read_run(self, file: str, run: list[Piece], destination: Bytes) -> int:
        descriptor, direct = self._open(file)
        if direct:
            try:
                return self._read_direct(descriptor, run, destination)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            # Some file systems open a file for direct reads and then refuse them.
            os.close(descriptor)
            descriptor = os.open(file, os.O_RDONLY)
            self._files[file] = descriptor, False
        return self._read_buffered(descriptor, run, destination)

    def _open(self, file: str) -> tuple[int, bool]:
        if file not in self._files:
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
            direct = self._direct
            if direct:
                try:
                    self._files[file] = os.open(file, flags | os.O_DIRECT), True
                except OSError:
                    direct = False  # tmpfs and some network file systems have no direct reads
            if not direct:
                self._files[file] = os.open(file, flags), False
        return self._files[file]

    def _read_buffered(self, descriptor: int, run: list[Piece], destination: Bytes) -> int:
        for piece in run:
            view = destination.data[piece.at : piece.at + piece.nbytes]
            done = 0
            while done < piece.nbytes:
                count = pread_into(descriptor, view[done:], piece.offset + done)
                if count == 0:
                    raise _ends_early(piece, piece.offset + done)
                done += count
        return sum(piece.nbytes for piece in run)

    def _read_direct(self, descriptor: int, run: list[Piece], destination: Bytes) -> int:
        if len(run) == 1 and _is_aligned(run[0], destination):
            return self._read_buffered(descriptor, run, destination)  # straight into place
        if self._bounce_map is None:
            self._bounce_map = mmap.mmap(-1, self._bounce_bytes)
            self._bounce = np.frombuffer(self._bounce_map, np.uint8)
        position = run[0].offset // BLOCK * BLOCK
        end = run[-1].offset + run[-1].nbytes
        total = 0
        while position < end:
            want = min(align(end - position, BLOCK), self._bounce_bytes)
            count = os.preadv(descriptor, [self._bounce.data[:want]], position)
            if position + count < end:
                count = count // BLOCK * BLOCK  # only the last block of a file is a short one
            if count == 0:
                raise _ends_early(run[-1], position)
            for piece in run:
                first = max(piece.offset, position)
                last = min(piece.offset + piece.nbytes, position + count)
                if first < last:
                    at = piece.at + first - piece.offset
                    destination[at : at + last - first] = self._bounce[first - position : last - position]
            position += count
            total += count
        return total


def cut(pieces: Sequence[Piece], parts: int) -> list[list[Piece]]:
    """The pieces in file order, cut into `parts` of about equal size, at multiples of BLOCK in the file."""
    result: list[list[Piece]] = [[] for _ in range(parts)]
    size = sum(piece.nbytes for piece in pieces) / parts
    done = 0
    for piece in sorted(pieces, key=lambda piece: (piece.file, piece.offset)):
        taken = 0
        while taken < piece.nbytes:
            part = min(int(done / size), parts - 1)
            left = piece.nbytes - taken
            if part < parts - 1:
                start = piece.offset + taken
                left = min(left, align(start + max(int((part + 1) * size) - done, 1), BLOCK) - start)
            result[part].append(Piece(piece.file, piece.offset + taken, left, piece.at + taken))
            taken += left
            done += left
    return result


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces in file order, grouped where they lie so near each other that one read is quicker than two."""
    run: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.file, piece.offset)):
        if run and (piece.file != run[-1].file or piece.offset - run[-1].offset - run[-1].nbytes > GAP_BYTES):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _is_aligned(piece: Piece, destination: Bytes) -> bool:
    return not (piece.offset | piece.nbytes | (destination.ctypes.data + piece.at)) % BLOCK


def _ends_early(piece: Piece, position: int) -> TransferError:
    return TransferError(
        f"{piece.file} ends at byte {position}, {piece.offset + piece.nbytes} are needed: "
        "it was changed while the model was running; copy or download it again"
    )
