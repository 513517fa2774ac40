"""What a disk gives, by the way it is asked: records of experts' sizes at random places of a checkpoint's files.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 4 --out /data/qwen3-4l
    python scripts/bench/disk.py /data/qwen3-4l
    python scripts/bench/disk.py /data/qwen3-4l --neighbours gpt-oss-20b.mmlu.safetensors

Direct reads by threads as the runtime makes them, direct reads through io_uring by one thread, buffered reads, and
copies out of a mapped file, whose pages the kernel reads as they are touched. Before buffered and mapped reads the page
cache is emptied; what a virtual machine's host keeps, no program can empty.

With --neighbours instead: would it pay to lay out experts that are missed together side by side, and to read neighbours
in one go (ExFlow's affinity, arXiv:2401.08383, for a file)? From the recorded trace, how many reads a layout saves:
every other sequence says what belongs together, the rest are replayed through LRU caches, one for each layer, and
misses of an event that are neighbours count as one read. From the disk, what a read saved is worth: four records asked
for at once, of which one pair or both pairs are neighbours, read apart, and in one go by `preadv` into two places.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from cache.counting.counting import Moves, count
from cache.lanes import Touch
from cache.traces.trace import Trace
from offload.checkpoint.layout import align
from offload.device.arena import HostRegion
from offload.store.files import BLOCK
from offload.store.readers import READERS
from offload.system.sizes import format_bytes
from scripts.bench.common import Args, Arguments, BenchmarkError, Result, note, show, take_turns, timed
from scripts.bench.storage import Place, bytes_per_s, drop_page_cache, for_seconds, places, reader, shards
from scripts.bench.uring import Ring

RECORD_BYTES = (256 * 2**10, 2**20, 2_654_208, 4_718_592, 9_437_184)
DEPTHS = {"direct": (1, 2, 4, 8, 16), "io_uring": (1, 2, 4, 8, 16), "buffered": (1, 2, 4), "mapped": (1, 2, 4)}
PAIR_BYTES = (2**16, 2**17, 2**18, 2**19, 2**20, 2_506_752)
SHARES = (8, 4, 2)  # a cache of one in so many experts

Events = list[list[int]]
"""Experts that are used, or missed, together."""


def benchmark(args: Args) -> Result:
    """Every way at every size and depth, in turn; medians over repetitions."""
    files, rng = shards(args.checkpoint), random.Random(0)
    if args.neighbours:
        return neighbours(Trace.open(args.neighbours), files[0], args.repetitions)

    def speed(way: str, depth: int, nbytes: int) -> float:
        if way in ("buffered", "mapped"):
            drop_page_cache(files)
        where = for_seconds(places(files, nbytes, rng), args.seconds, depth)
        if way == "io_uring":
            return _through_ring(where, nbytes, depth)
        return bytes_per_s([reader(way, files, nbytes) for _ in range(depth)], where)

    ways = {}
    for way, depths in DEPTHS.items():
        try:
            speed(way, 1, BLOCK)
        except OSError as error:
            note(f"{way} does not work here: {error.strerror or error}")
            continue
        for depth in depths:
            for nbytes in (align(each, BLOCK) for each in RECORD_BYTES):
                ways[way, depth, nbytes] = partial(speed, way, depth, nbytes)
    medians = {cell: median(each) for cell, each in take_turns(ways, args.repetitions, warm_up=False).items()}
    lines: dict[str, dict[str, float]] = {}
    for (way, depth, nbytes), each in medians.items():
        lines.setdefault(f"{format_bytes(nbytes)}, {way}", {})[str(depth)] = each / 1e9
    show(lines, "GB/s by depth")
    names = ("way", "depth", "record_bytes")
    return {"rows": [dict(zip(names, cell, strict=True)) | {"bytes_per_s": each} for cell, each in medians.items()]}


def _through_ring(where: Iterator[Place], nbytes: int, depth: int) -> float:
    """Bytes a second of direct reads at `where`, `depth` of them under way, by one thread."""
    targets, free, ended = [HostRegion(nbytes).array for _ in range(depth)], list(range(depth)), 0
    with ExitStack() as stack:

        @cache
        def handle(file: str) -> int:
            opened = os.open(file, os.O_RDONLY | os.O_DIRECT)
            stack.callback(os.close, opened)
            return opened

        ring, began = stack.enter_context(Ring(depth)), time.perf_counter()
        while True:
            for tag, (file, offset) in zip(list(free), where, strict=False):
                ring.queue(handle(file), offset, targets[tag].ctypes.data, nbytes, tag)
                free.remove(tag)
            if len(free) == depth:
                return ended * nbytes / (time.perf_counter() - began)
            for tag, read in ring.wait():
                if read < nbytes:
                    raise BenchmarkError(f"a read ended after {read} of {nbytes} bytes")
                free.append(tag)
                ended += 1


def neighbours(trace: Trace, file: Path, repetitions: int) -> Result:
    """The reads that layouts save, and what a read saved is worth."""
    saved = {str(slots): _saved(trace, slots) for slots in (trace.num_experts // share for share in SHARES)}
    show(saved, "reads saved, by slots a layer")
    times = {format_bytes(nbytes): _times(file, nbytes, repetitions) for nbytes in PAIR_BYTES}
    show(times, "seconds of four records")
    return {"saved": saved, "times": times}


def _saved(trace: Trace, slots: int) -> dict[str, float]:
    """Shares of the reads that layouts save at this many slots a layer."""
    sequences = len(trace.sequence_offsets) - 1
    told, asked = (trace.select(range(start, sequences, 2)) for start in (0, 1))
    (_, seen), (hit_rate, missed) = (_misses(each, slots) for each in (told, asked))
    orders = {
        "as_numbered": [list(range(trace.num_experts))] * trace.num_layers,
        "together": [_order(told.experts[:, layer].tolist(), trace.num_experts) for layer in range(trace.num_layers)],
        "missed_together": [_order(events, trace.num_experts) for events in seen],
    }
    apart = sum(len(event) for events in missed for event in events)
    return {"hit_rate": hit_rate} | {
        name: 1 - sum(map(_reads, missed, order)) / apart for name, order in orders.items()
    }


def _misses(trace: Trace, slots: int) -> tuple[float, list[Events]]:
    """The hit rate of LRU caches, and what each event fetches, by layer, of those that fetch anything."""
    fetched: list[Events] = [[] for _ in range(trace.num_layers)]

    def see(_: Touch, gone: Moves, come: Moves) -> None:
        events: dict[int, list[int]] = {}
        for layer, expert in (divmod(int(at), trace.num_experts) for _, moved in come for at in moved):
            events.setdefault(layer, []).append(expert)
        for layer, event in events.items():
            fetched[layer].append(event)

    (counted,) = count(trace, "lru", [[slots] * trace.num_layers], cold=False, observer=see)
    return counted.hit_rate, fetched


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


if __name__ == "__main__":
    arguments = Arguments(__doc__, "checkpoint", repetitions=5)
    arguments.option("--seconds", 0.4, "of each measurement")
    arguments.option("--neighbours", None, "a recorded trace: what a layout of experts would save", type=Path)
    raise SystemExit(arguments.run(benchmark))
