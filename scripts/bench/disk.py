"""What a disk gives, by the way it is asked: records of experts' sizes at random places of a checkpoint's files.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 4 --out /data/qwen3-4l
    python scripts/bench/disk.py /data/qwen3-4l
    python scripts/bench/disk.py /data/qwen3-4l --neighbours gpt-oss-20b.mmlu.safetensors

Direct reads by threads as the runtime makes them, direct reads through io_uring by one thread, buffered reads, and
copies out of a mapped file, whose pages the kernel reads as they are touched. Before buffered and mapped reads the page
cache is emptied; what a virtual machine's host keeps, no program can empty. All ways take turns, in another order each
time. The last line is JSON.

With --neighbours instead: would it pay to lay out experts that are missed together side by side, and to read neighbours
in one go (ExFlow's affinity, arXiv:2401.08383, for a file)? From the recorded trace, how many reads a layout saves:
every other sequence says what belongs together, the rest are replayed through LRU caches, one for each layer, and
misses of an event that are neighbours count as one read. From the disk, what a read saved is worth: four records asked
for at once, of which one pair or both pairs are neighbours, read apart, and in one go by `preadv` into two places.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.trace import Trace
from offload.checkpoint.layout import align
from offload.device.arena import HostRegion
from offload.store.files import BLOCK
from offload.store.readers import READERS
from offload.system.sizes import format_bytes
from scripts.bench.common import Arguments, BenchmarkError, note, show, take_turns, timed
from scripts.bench.storage import Place, bytes_per_s, drop_page_cache, for_seconds, places, reader, shards
from scripts.bench.uring import Ring

RECORD_BYTES = (256 * 2**10, 2**20, 2_654_208, 4_718_592, 9_437_184)
DEPTHS = {"direct": (1, 2, 4, 8, 16), "io_uring": (1, 2, 4, 8, 16), "buffered": (1, 2, 4), "mapped": (1, 2, 4)}
PAIR_BYTES = (2**16, 2**17, 2**18, 2**19, 2**20, 2_506_752)
SHARES = (8, 4, 2)  # a cache of one in so many experts

Events = list[list[int]]
"""Experts that are used, or missed, together."""


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Every way at every size and depth, in turn; medians over repetitions."""
    files = shards(args.checkpoint)
    if args.neighbours:
        return neighbours(Trace.open(args.neighbours), files[0], args.repetitions)
    cells = [(way, depth, align(nbytes, BLOCK)) for nbytes in RECORD_BYTES for way in DEPTHS for depth in DEPTHS[way]]
    samples: dict[tuple[str, int, int], list[float]] = {cell: [] for cell in cells}
    rng = random.Random(0)
    dropped: list[str] = []
    for repetition in range(args.repetitions):
        for cell in rng.sample(cells, len(cells)):
            way, depth, nbytes = cell
            if way in dropped:
                continue
            if way in ("buffered", "mapped"):
                drop_page_cache(files)
            where = for_seconds(places(files, nbytes, rng), args.seconds, depth)
            try:
                samples[cell].append(
                    _through_ring(where, nbytes, depth)
                    if way == "io_uring"
                    else bytes_per_s([reader(way, files, nbytes) for _ in range(depth)], where)
                )
            except OSError as error:
                note(f"{way} does not work here: {error.strerror or error}")
                dropped.append(way)
        note(f"repetition {repetition + 1} of {args.repetitions}")
    medians = {cell: median(each) for cell, each in samples.items() if each}
    lines: dict[str, dict[str, float]] = {}
    for (way, depth, nbytes), speed in medians.items():
        lines.setdefault(f"{format_bytes(nbytes)}, {way}", {})[str(depth)] = speed / 1e9
    show(lines, "GB/s by depth")
    names = ("way", "depth", "record_bytes")
    return {"rows": [dict(zip(names, cell, strict=True)) | {"bytes_per_s": speed} for cell, speed in medians.items()]}


def _through_ring(where: Iterator[Place], nbytes: int, depth: int) -> float:
    """Bytes a second of direct reads at `where`, `depth` of them under way, by one thread."""
    targets = [HostRegion(nbytes).array for _ in range(depth)]
    handles: dict[str, int] = {}
    read = [0]

    def queue(tag: int) -> int:
        """Ask for the next place; 0 where there is none."""
        for file, offset in where:
            if file not in handles:
                handles[file] = os.open(file, os.O_RDONLY | os.O_DIRECT)
            ring.queue(handles[file], offset, targets[tag].ctypes.data, nbytes, tag)
            return 1
        return 0

    def all_reads() -> None:
        under_way = sum(queue(tag) for tag in range(depth))
        while under_way:
            for tag, count in ring.wait():
                if count < nbytes:
                    raise BenchmarkError(f"a read ended after {count} of {nbytes} bytes")
                read[0] += count
                under_way += queue(tag) - 1

    with Ring(depth) as ring:
        try:
            seconds = timed(all_reads)()
            return read[0] / seconds
        finally:
            for handle in handles.values():
                os.close(handle)


def neighbours(trace: Trace, file: Path, repetitions: int) -> dict[str, Any]:
    """The reads that layouts save, and what a read saved is worth."""
    saved = {str(slots): _saved(trace, slots) for slots in (trace.num_experts // share for share in SHARES)}
    show(saved, "reads saved, by slots a layer")
    times = {format_bytes(nbytes): _times(file, nbytes, repetitions) for nbytes in PAIR_BYTES}
    show(times, "seconds of four records")
    return {"saved": saved, "times": times}


def _saved(trace: Trace, slots: int) -> dict[str, float]:
    """Shares of the reads that layouts save at this many slots a layer."""
    told, asked = ([_routed(trace, start, layer) for layer in range(trace.num_layers)] for start in (0, 1))
    seen, missed = ([_misses(events, slots) for events in layers] for layers in (told, asked))
    count = sum(len(event) for events in missed for event in events)
    orders = {
        "as_numbered": [list(range(trace.num_experts))] * trace.num_layers,
        "together": [_order(events, trace.num_experts) for events in told],
        "missed_together": [_order(events, trace.num_experts) for events in seen],
    }
    saved = {name: 1 - sum(map(_reads, missed, order)) / count for name, order in orders.items()}
    return {"hit_rate": 1 - count / sum(len(event) for events in asked for event in events), **saved}


def _routed(trace: Trace, start: int, layer: int) -> Events:
    """The experts of every token of every other sequence."""
    offsets = trace.sequence_offsets
    rows = np.concatenate([np.arange(*offsets[s : s + 2]) for s in range(start, len(offsets) - 1, 2)])
    return [list(map(int, event)) for event in trace.experts[rows, layer]]


def _misses(events: Events, slots: int) -> Events:
    """What each event misses in an LRU cache, of those that miss anything."""
    held: OrderedDict[int, None] = OrderedDict()
    missed = []
    for experts in events:
        missed.append([expert for expert in experts if expert not in held])
        for expert in reversed(experts):  # the strongest is touched last
            held[expert] = None
            held.move_to_end(expert)
        while len(held) > slots:
            held.popitem(last=False)
    return [event for event in missed if event]


def _order(events: Events, experts: int) -> list[int]:
    """Experts in a row, those seen together most often side by side: the best pairs first, joined to chains."""
    counts: NDArray[np.int64] = np.zeros((experts, experts), np.int64)
    for event in events:
        counts[np.ix_(event, event)] += 1
    chains = {expert: [expert] for expert in range(experts)}  # by each of its ends
    pairs = [(i, j) for i in range(experts) for j in range(i)]
    for a, b in sorted(pairs, key=lambda pair: -counts[pair]):
        first, second = chains.get(a), chains.get(b)
        if first is None or second is None or first is second:
            continue
        joined = (first if first[-1] == a else first[::-1]) + (second if second[0] == b else second[::-1])
        for end in (first[0], first[-1], second[0], second[-1]):
            chains.pop(end, None)
        chains[joined[0]] = chains[joined[-1]] = joined
    return next(iter(chains.values()))


def _reads(events: Events, order: Sequence[int]) -> int:
    """How many reads serve a layer's misses where neighbours are read in one go."""
    place = {expert: at for at, expert in enumerate(order)}
    return sum(1 + sum(b - a > 1 for a, b in pairwise(sorted(place[e] for e in event))) for event in events)


def _times(file: Path, nbytes: int, repetitions: int) -> dict[str, float]:
    """Median seconds of four records, by how many pairs of them are read in one go."""
    handle, blocks = os.open(file, os.O_RDONLY | os.O_DIRECT), (file.stat().st_size - 2 * nbytes) // BLOCK
    targets, rng = [HostRegion(nbytes).array.data for _ in range(4)], random.Random(0)

    def read(pool: ThreadPoolExecutor, pairs: int) -> None:
        groups = [targets[2 * i : 2 * i + 2] for i in range(pairs)] + [[target] for target in targets[2 * pairs :]]
        list(pool.map(lambda group: os.preadv(handle, group, rng.randrange(blocks) * BLOCK), groups))

    try:
        with ThreadPoolExecutor(READERS) as pool:
            ways = {pairs: timed(partial(read, pool, pairs)) for pairs in range(3)}
            seconds = {pairs: median(each) for pairs, each in take_turns(ways, repetitions).items()}
    finally:
        os.close(handle)
    return {"apart_s": seconds[0], "one_pair": seconds[1] / seconds[0], "two_pairs": seconds[2] / seconds[0]}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, "checkpoint", repetitions=5)
    arguments.option("--seconds", 0.4, "of each measurement")
    arguments.option("--neighbours", None, "a recorded trace: what a layout of experts would save", type=Path)
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
