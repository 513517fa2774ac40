"""What a disk gives, by the way it is asked: records of experts' sizes at random places of a checkpoint's files.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 4 --out /data/qwen3-4l
    python scripts/bench/disk.py /data/qwen3-4l

Direct reads by threads as the runtime makes them, direct reads through io_uring by one thread, buffered reads, and
copies out of a mapped file, whose pages the kernel reads as they are touched. Before buffered and mapped reads the page
cache is emptied; what a virtual machine's host keeps, no program can empty. All ways take turns, in another order each
time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from offload.checkpoint.parameter import Piece, align
from offload.device.arena import HostRegion
from offload.store.files import BLOCK, FileReader
from offload.system.sizes import format_bytes
from scripts.bench.common import BenchmarkError, drop_page_cache, note, run, shards
from scripts.bench.uring import Ring

RECORD_BYTES = (256 * 2**10, 2**20, 2_654_208, 4_718_592, 9_437_184)
DEPTHS = {"direct": (1, 2, 4, 8, 16), "io_uring": (1, 2, 4, 8, 16), "buffered": (1, 2, 4), "mapped": (1, 2, 4)}

Read = Callable[[str, int], int]
"""Reads one record of a file from this place; returns its bytes."""


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Every way at every size and depth, in turn; medians over repetitions."""
    files = shards(args.checkpoint)
    cells = [(way, depth, align(nbytes, BLOCK)) for nbytes in RECORD_BYTES for way in DEPTHS for depth in DEPTHS[way]]
    samples: dict[tuple[str, int, int], list[float]] = {cell: [] for cell in cells}
    rng = random.Random(args.seed)
    dropped: list[str] = []
    for repetition in range(args.repetitions):
        for cell in rng.sample(cells, len(cells)):
            way, depth, nbytes = cell
            if way in dropped:
                continue
            if way in ("buffered", "mapped"):
                drop_page_cache(files)
            try:
                samples[cell].append(bytes_per_s(way, files, nbytes, depth, args.seconds, rng))
            except OSError as error:
                note(f"{way} does not work here: {error.strerror or error}")
                dropped.append(way)
        note(f"repetition {repetition + 1} of {args.repetitions}")
    rows: list[dict[str, Any]] = [
        {"way": way, "depth": depth, "record_bytes": nbytes, "bytes_per_s": median(samples[way, depth, nbytes])}
        for way, depth, nbytes in cells
        if samples[way, depth, nbytes]
    ]
    for nbytes in RECORD_BYTES:
        size = align(nbytes, BLOCK)
        for way in DEPTHS:
            each = [row for row in rows if row["way"] == way and row["record_bytes"] == size]
            figures = ", ".join(f"{row['depth']}: {row['bytes_per_s'] / 1e9:.2f}" for row in each)
            note(f"{format_bytes(size):>10} {way:>8}  GB/s by depth  {figures}")
    return {"benchmark": "disk", "repetitions": args.repetitions, "seconds": args.seconds, "rows": rows}


def bytes_per_s(way: str, files: Sequence[Path], nbytes: int, depth: int, seconds: float, rng: random.Random) -> float:
    """Bytes a second of records at random places, `depth` of them under way at any time. Raises OSError."""
    places = _places(files, nbytes, rng)
    if way == "io_uring":
        return _through_ring(places, nbytes, depth, seconds)
    return _by_threads([_reader(way, files, nbytes) for _ in range(depth)], places, seconds)


def _places(files: Sequence[Path], nbytes: int, rng: random.Random) -> Iterator[tuple[str, int]]:
    """Without end: a file and an aligned place in it with a record behind it."""
    sizes = {str(path): path.stat().st_size for path in files if path.stat().st_size > nbytes}
    if not sizes:
        raise BenchmarkError(f"no file is larger than one record of {nbytes} bytes")
    names = list(sizes)
    while True:
        name = rng.choices(names, list(sizes.values()))[0]
        yield name, rng.randint(0, (sizes[name] - nbytes) // BLOCK) * BLOCK


def _reader(way: str, files: Sequence[Path], nbytes: int) -> Read:
    """One thread's way to read a record into memory of its own."""
    target = HostRegion(nbytes).array
    if way == "mapped":
        maps = {str(path): np.memmap(path, np.uint8, "r") for path in files}

        def copy(file: str, offset: int) -> int:
            np.copyto(target, maps[file][offset : offset + nbytes])
            return nbytes

        return copy
    reader = FileReader(direct=way == "direct")
    return lambda file, offset: reader.read([Piece(file, offset, nbytes, 0)], target)


def _by_threads(readers: Sequence[Read], places: Iterator[tuple[str, int]], seconds: float) -> float:
    lock, start = threading.Lock(), threading.Barrier(len(readers) + 1)
    read = [0] * len(readers)
    failures: list[Exception] = []
    end = 0.0

    def work(index: int) -> None:
        start.wait()
        try:
            while not read[index] or time.perf_counter() < end:
                with lock:
                    file, offset = next(places)
                read[index] += readers[index](file, offset)
        except Exception as error:  # raised below, on the thread that asked
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(readers))]
    for thread in threads:
        thread.start()
    end = time.perf_counter() + seconds
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum(read) / (time.perf_counter() - began)


def _through_ring(places: Iterator[tuple[str, int]], nbytes: int, depth: int, seconds: float) -> float:
    targets = [HostRegion(nbytes).array for _ in range(depth)]
    handles: dict[str, int] = {}

    def queue(tag: int) -> None:
        file, offset = next(places)
        if file not in handles:
            handles[file] = os.open(file, os.O_RDONLY | os.O_DIRECT)
        ring.queue(handles[file], offset, targets[tag].ctypes.data, nbytes, tag)

    with Ring(depth) as ring:
        try:
            began = time.perf_counter()
            for tag in range(depth):
                queue(tag)
            under_way, read = depth, 0
            while under_way:
                for tag, count in ring.wait():
                    if count < nbytes:
                        raise BenchmarkError(f"a read ended after {count} of {nbytes} bytes")
                    read += count
                    under_way -= 1
                    if time.perf_counter() < began + seconds:
                        queue(tag)
                        under_way += 1
            return read / (time.perf_counter() - began)
        finally:
            for handle in handles.values():
                os.close(handle)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder with *.safetensors, larger than the disk's own cache")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each measurement (default 0.4)")
    parser.add_argument("--repetitions", type=int, default=5, help="default 5")
    parser.add_argument("--seed", type=int, default=0, help="of the places (default 0)")
    args = parser.parse_args(argv)
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
