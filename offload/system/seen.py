"""Whether a file is still what it was when it was looked at: what the system says of it, compared beside every read.

The system notes the time of a change before the first byte of it. So what was read is what was there before, if after
the read device, inode, size and times are the same. A file that was replaced has another inode: that is noticed where
it is opened next. Whoever has the old one open reads the old bytes, and these are right.

The time of the last change (ctime) differs after a mere change of permissions or links, too. Where it alone differs,
blocks from all over the file are compared with those of before. So weights of another training are noticed even if
somebody put the time of modification back. Who changes a few bytes between these blocks, and then does so, is not.
So it is where the number of the inode alone differs: some network file systems number a file anew.
"""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.errors import TransferError

_BLOCK = 4096
_BLOCK_EVERY = 256 * 2**20
_BLOCKS = 16  # at least
_WHAT = ("device", "inode", "size", "time of modification", "time of change")
_OFTEN_HARMLESS = ({"time of change"}, {"inode"}, {"device"}, {"device", "inode"})

_State = tuple[int, int, int, int, int]


class SeenFile:
    """One file, as it was seen when this was made. Threads share it; each reads by a descriptor of its own."""

    def __init__(self, path: str | Path) -> None:
        """Raises OSError."""
        self.path = str(path)
        self._state = _state(Path(path).stat())
        self._same = {self._state}  # and others, with the same samples
        self._sample: int | None = None
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes it had."""
        return self._state[2]

    @property
    def modified_ns(self) -> int:
        """When it had been modified last."""
        return self._state[3]

    def sample(self) -> int:
        """A checksum of blocks from all over it, which are read once. Raises TransferError."""
        with self._lock:
            if self._sample is None:
                try:
                    with Path(self.path).open("rb", buffering=0) as file:
                        sample = _sample(file.fileno(), self.size)
                        self._compare(_state(os.fstat(file.fileno())), file.fileno())
                except OSError as error:
                    reason = error.strerror or error
                    raise TransferError(f"reading {self.path} failed: {reason}: is the disk still there?") from error
                self._sample = sample
            return self._sample

    def check(self, descriptor: int) -> None:
        """Whether what was read from `descriptor`, until now, is what was seen.

        Raises TransferError if it may not be, and OSError.
        """
        if _state(os.fstat(descriptor)) not in self._same:
            with self._lock:
                self._compare(_state(os.fstat(descriptor)), descriptor)

    @contextmanager
    def changing(self, descriptor: int) -> Iterator[None]:
        """While this process itself writes to it, by `descriptor`: no reader takes that for a change."""
        with self._lock:
            self._compare(_state(os.fstat(descriptor)), descriptor)
            try:
                yield
            finally:
                self._state = _state(os.fstat(descriptor))
                self._same = {self._state}
                self._sample = _sample(descriptor, self.size)

    def _compare(self, now: _State, descriptor: int) -> None:
        """As `check`, alone."""
        if now in self._same:
            return
        differences = ([w for w, a, b in zip(_WHAT, now, each, strict=True) if a != b] for each in self._same)
        differs = min(differences, key=len)
        if set(differs) in _OFTEN_HARMLESS and self._sample is not None:
            if _sample(descriptor, self.size) == self._sample and _state(os.fstat(descriptor)) == now:
                self._same.add(now)
                return
            differs = ["content"]
        raise TransferError(
            f"{self.path} was changed while the model was running (its {differs[0]} differs): start again, "
            "or copy or download it again if it should be as before"
        )


def _state(stat: os.stat_result) -> _State:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _sample(descriptor: int, size: int) -> int:
    """CRC-32 of blocks that are spread over a file of `size` bytes, its first one among them."""
    count = max(_BLOCKS, -(-size // _BLOCK_EVERY))
    places = sorted({size * i // count // _BLOCK * _BLOCK for i in range(count)})
    result = 0
    with mmap.mmap(-1, _BLOCK) as block:  # aligned, as direct reads want it
        for place in places:
            with memoryview(block) as view:
                result = zlib.crc32(view[: pread_into(descriptor, view, place)], result)
    return result


def _seek_and_read(descriptor: int, view: memoryview, offset: int) -> int:
    os.lseek(descriptor, offset, os.SEEK_SET)
    data = os.read(descriptor, len(view))
    view[: len(data)] = data
    return len(data)


def _preadv(descriptor: int, view: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [view], offset)


# Windows has no positioned reads; every reader has its own descriptors there, so that seeking is safe.
pread_into: Callable[[int, memoryview, int], int] = _preadv if hasattr(os, "preadv") else _seek_and_read
