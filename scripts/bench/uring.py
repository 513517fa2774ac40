"""Linux's io_uring by its bare system calls: as much of it as it takes to read files with many reads under way.

For benchmarks: it answers what a queue of the kernel's own would give beside threads that each wait for one read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator

_SETUP, _ENTER = 425, 426  # system calls, the same numbers on every architecture
_OP_READ = 22
_GET_EVENTS = 1
_SQE_BYTES = 64
_SQ_RING, _SQES = 0, 0x10000000  # what is mapped, as the offset says it
_LIBC = ctypes.CDLL(None, use_errno=True)


class Ring:
    """A queue of `depth` reads. Use it as a context, from one thread. Raises OSError where the kernel has none."""

    def __init__(self, depth: int) -> None:
        parameters = bytearray(120)
        buffer = (ctypes.c_char * len(parameters)).from_buffer(parameters)
        self._fd = _call(_SETUP, depth, buffer)
        fields = struct.unpack("<30I", parameters)
        self._sq_tail, self._sq_mask, array = fields[11], fields[12], fields[16]
        self._cq_head, self._cq_tail, self._cq_mask, self._cqes = fields[20], fields[21], fields[22], fields[25]
        entries = fields[1]
        size = max(array + 4 * fields[0], self._cqes + 16 * entries)
        self._ring = mmap.mmap(self._fd, size, mmap.MAP_SHARED, offset=_SQ_RING)
        self._sqes = mmap.mmap(self._fd, fields[0] * _SQE_BYTES, mmap.MAP_SHARED, offset=_SQES)
        for i in range(fields[0]):
            struct.pack_into("<I", self._ring, array + 4 * i, i)
        self._queued = 0

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        self._sqes.close()
        self._ring.close()
        os.close(self._fd)

    def queue(self, file: int, offset: int, address: int, nbytes: int, tag: int) -> None:
        """Queue a read into memory at `address`; `tag` comes back with its end."""
        tail = self._value(self._sq_tail)
        at = (tail & self._value(self._sq_mask)) * _SQE_BYTES
        entry = struct.pack("<BBHiQQIIQ", _OP_READ, 0, 0, file, offset, address, nbytes, 0, tag)
        self._sqes[at : at + _SQE_BYTES] = entry.ljust(_SQE_BYTES, b"\0")
        struct.pack_into("<I", self._ring, self._sq_tail, (tail + 1) & 0xFFFFFFFF)
        self._queued += 1

    def wait(self) -> Iterator[tuple[int, int]]:
        """Submit what is queued, and wait for one read at least: (tag, bytes read) of all that have ended.

        Raises OSError for a read that failed.
        """
        _call(_ENTER, self._fd, self._queued, 1, _GET_EVENTS, None, 0)
        self._queued = 0
        head, tail, mask = self._value(self._cq_head), self._value(self._cq_tail), self._value(self._cq_mask)
        ended = []
        while head != tail:
            tag, result = struct.unpack_from("<Qi", self._ring, self._cqes + 16 * (head & mask))
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            ended.append((tag, result))
            head = (head + 1) & 0xFFFFFFFF
        struct.pack_into("<I", self._ring, self._cq_head, head)
        yield from ended

    def _value(self, at: int) -> int:
        value: int = struct.unpack_from("<I", self._ring, at)[0]
        return value


def _call(number: int, *arguments: object) -> int:
    result: int = _LIBC.syscall(number, *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
