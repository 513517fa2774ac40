"""A checkpoint's files on their disk: cached pages forgotten, and how fast records at random places are read."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import TypeVar

import numpy as np

from cache.errors import DiskSpaceError
from offload.checkpoint.layout import Piece, align
from offload.device.arena import HostRegion
from offload.store.files import BLOCK, FileReader
from offload.system.sizes import format_bytes
from scripts.bench.common import BenchmarkError

T = TypeVar("T")
Place = tuple[str, int]
"""A file, and an offset in it."""
Read = Callable[[str, int], int]
"""Reads one record from a place; returns its bytes."""


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises BenchmarkError when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BenchmarkError(f"{folder} holds no *.safetensors: write one with scripts/bench/make_checkpoint.py")
    return files


def size_bytes(folder: Path) -> int:
    """All that its safetensors files hold."""
    return sum(path.stat().st_size for path in shards(folder))


def need_space(folder: Path, nbytes: int, why: str) -> None:
    """Raises DiskSpaceError where `folder`, which exists, has less than `nbytes` free."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise DiskSpaceError(f"{folder} has {format_bytes(free)} free, {format_bytes(nbytes)} are needed: {why}")


def drop_page_cache(files: Sequence[Path]) -> None:
    """Ask the kernel to forget the cached pages of `files`, so that the next read comes from the disk."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def read_ahead_kb(folder: Path, devices: Path = Path("/sys/dev/block")) -> int | None:
    """How far the kernel reads ahead in mapped files on the disk of `folder`; None where it does not say."""
    number = folder.stat().st_dev
    device = devices / f"{os.major(number)}:{os.minor(number)}"
    for place in (device, device.resolve().parent):  # a partition has the settings of its disk
        with suppress(OSError, ValueError):
            return int((place / "queue" / "read_ahead_kb").read_text())
    return None


def places(files: Sequence[Path], nbytes: int, rng: random.Random) -> Iterator[Place]:
    """Without end: a file and an aligned offset in it with `nbytes` behind it, anywhere. Raises BenchmarkError."""
    sizes = {str(path): size for path in files if (size := path.stat().st_size) > nbytes}
    if not sizes:
        raise BenchmarkError(f"no shard is larger than one record of {nbytes} bytes")
    names = list(sizes)
    while True:
        name = rng.choices(names, list(sizes.values()))[0]
        yield name, rng.randint(0, (sizes[name] - nbytes) // BLOCK) * BLOCK


def for_seconds(where: Iterable[Place], seconds: float, at_least: int) -> Iterator[Place]:
    """As many of `where` as are asked for in that time."""
    end = time.perf_counter() + seconds
    for number, place in enumerate(where):
        if number >= at_least and time.perf_counter() > end:
            return
        yield place


def reader(way: str, files: Sequence[Path], nbytes: int) -> Read:
    """One thread's way to read a record into memory of its own: "direct" as the runtime does, "buffered", "mapped"."""
    target = HostRegion(nbytes).array
    if way == "mapped":
        maps = {str(path): np.memmap(path, np.uint8, "r") for path in files}

        def copy(file: str, offset: int) -> int:
            np.copyto(target, maps[file][offset : offset + nbytes])
            return nbytes

        return copy
    files_read = FileReader(direct=way == "direct")
    return lambda file, offset: files_read.read([Piece(file, offset, nbytes, 0)], target)


def bytes_per_s(readers: Sequence[Read], where: Iterator[Place]) -> float:
    """How fast `readers`, a thread each, read what is at `where`, until that ends. Raises what one of them raises."""
    lock, start = threading.Lock(), threading.Barrier(len(readers) + 1)
    read = [0] * len(readers)
    failures: list[Exception] = []

    def work(index: int) -> None:
        start.wait()
        try:
            while True:
                with lock:
                    place = next(where, None)
                if place is None:
                    return
                read[index] += readers[index](*place)
        except Exception as error:  # raised below, on the thread that asked
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(readers))]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if failures:
        raise failures[0]
    return sum(read) / seconds


def disk_bandwidth(
    files: Sequence[Path],
    record_bytes: int,
    *,
    seed: int,
    total_bytes: int = 1 << 30,
    threads: Sequence[int] = (1, 2, 4),
) -> float:
    """Bytes/s of direct reads of `record_bytes` at random places of `files`: the best of `threads`, in turn.

    Direct reads pass the page cache by, so this is the disk's own speed. Each count reads `total_bytes`.
    """
    nbytes = align(record_bytes, BLOCK)
    where = places(files, nbytes, random.Random(seed))

    def speed(count: int) -> float:
        reads = islice(where, max(count, total_bytes // nbytes))
        return bytes_per_s([reader("direct", files, nbytes) for _ in range(count)], reads)

    return max(map(speed, threads))


def beside_disk(
    files: Sequence[Path], record_bytes: int, total_bytes: int, seed: int, action: Callable[[], T]
) -> tuple[T, float]:
    """What `action` returns, and the disk's bytes/s before and after it, averaged."""

    def disk(seed: int) -> float:
        return disk_bandwidth(files, record_bytes, seed=seed, total_bytes=total_bytes)

    before = disk(2 * seed)
    result = action()
    return result, mean((before, disk(2 * seed + 1)))
