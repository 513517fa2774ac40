"""Would it pay to lay out experts that are missed together side by side, and to read neighbours in one go (ExFlow's
affinity, arXiv:2401.08383, for a file)?

    python scripts/bench/layout.py gpt-oss-20b.mmlu.safetensors /data/qwen3-4l

From a recorded trace, how many reads a layout saves: every other sequence says what belongs together, the rest are
replayed through LRU caches, one for each layer, and misses of an event that are neighbours count as one read. From the
disk, what a read saved is worth: four records asked for at once, of which one pair or both pairs are neighbours, read
apart, and in one go by `preadv` into two places. All ways take turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.trace import Trace
from offload.device.arena import HostRegion
from offload.engine.channel import Channel
from offload.store.files import BLOCK
from offload.store.readers import READERS
from offload.system.sizes import format_bytes
from scripts.bench.common import note, run, shards

RECORD_BYTES = (2**16, 2**17, 2**18, 2**19, 2**20, 2_506_752)
SHARES = (8, 4, 2)  # a cache of one in so many experts

Misses = list[list[list[int]]]
"""By layer, the experts that each event missed."""
Read = tuple[list[memoryview], int]
"""Where a read's bytes go, and their place in the file."""


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Both halves."""
    trace = Trace.open(args.trace)
    saved = [_saved(trace, trace.num_experts // share) for share in SHARES]
    for row in saved:
        note(
            f"{row['slots']} slots, hit rate {row['hit_rate']:.2f}: fewer reads by {row['as_numbered']:.1%} as "
            f"numbered, {row['together']:.1%} by what is routed together, {row['missed_together']:.1%} missed together"
        )
    times = [_times(shards(args.checkpoint)[0], nbytes, args.repetitions) for nbytes in RECORD_BYTES]
    for row in times:
        note(
            f"{format_bytes(row['record_bytes']):>9}: four reads {row['apart_s'] * 1000:.3f} ms; one pair in one go "
            f"{row['one_pair_s'] / row['apart_s']:.3f} of that, both {row['two_pairs_s'] / row['apart_s']:.3f}"
        )
    return {"benchmark": "layout", "trace": args.trace.name, "saved": saved, "times": times}


def _saved(trace: Trace, slots: int) -> dict[str, float]:
    """Shares of the reads that layouts save at this many slots a layer."""
    sequences = range(len(trace.sequence_offsets) - 1)
    seen, asked = _replay(trace, sequences[::2], slots), _replay(trace, sequences[1::2], slots)
    routed = [[sorted(set(row)) for row in rows] for rows in _routed(trace, sequences[::2])]
    experts = trace.num_experts
    count = sum(len(event) for events in asked for event in events)
    uses = trace.experts.shape[1] * trace.experts.shape[2] * sum(_length(trace, s) for s in sequences[1::2])
    plain = [list(range(experts))] * len(asked)
    return {
        "slots": slots,
        "hit_rate": 1 - count / uses,
        "as_numbered": 1 - _reads(asked, plain) / count,
        "together": 1 - _reads(asked, [_order(events, experts) for events in routed]) / count,
        "missed_together": 1 - _reads(asked, [_order(events, experts) for events in seen]) / count,
    }


def _length(trace: Trace, sequence: int) -> int:
    return int(trace.sequence_offsets[sequence + 1] - trace.sequence_offsets[sequence])


def _routed(trace: Trace, sequences: Sequence[int]) -> list[list[list[int]]]:
    """By layer, the experts of every token."""
    offsets = trace.sequence_offsets
    rows = np.concatenate([np.arange(offsets[s], offsets[s + 1]) for s in sequences])
    by_layer: list[list[list[int]]] = trace.experts[rows].transpose(1, 0, 2).tolist()
    return by_layer


def _replay(trace: Trace, sequences: Sequence[int], slots: int) -> Misses:
    result: Misses = []
    for rows in _routed(trace, sequences):
        held: OrderedDict[int, None] = OrderedDict()
        events = []
        for experts in rows:
            missing = [expert for expert in experts if expert not in held]
            for expert in reversed(experts):  # the strongest is touched last
                held[expert] = None
                held.move_to_end(expert)
            while len(held) > slots:
                held.popitem(last=False)
            if missing:
                events.append(missing)
        result.append(events)
    return result


def _order(events: Sequence[Sequence[int]], experts: int) -> list[int]:
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


def _reads(misses: Misses, orders: Sequence[Sequence[int]]) -> int:
    """How many reads serve `misses` where neighbours are read in one go."""
    count = 0
    for events, order in zip(misses, orders, strict=True):
        place = {expert: at for at, expert in enumerate(order)}
        for event in events:
            count += 1 + sum(b - a > 1 for a, b in pairwise(sorted(place[expert] for expert in event)))
    return count


def _times(file: Path, nbytes: int, repetitions: int) -> dict[str, float]:
    """Median seconds of four records, by how many pairs of them are read in one go."""
    handle, size = os.open(file, os.O_RDONLY | os.O_DIRECT), file.stat().st_size
    channel: Channel[Read] = Channel()
    done: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()

    def work() -> None:
        while (read := channel.get()) is not None:
            try:
                os.preadv(handle, *read)
                done.put(None)
            except OSError as error:  # raised below, on the thread that asked
                done.put(error)

    threads = [threading.Thread(target=work) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    places = [HostRegion(nbytes).array.data for _ in range(4)]
    rng = random.Random(0)
    samples: dict[int, list[float]] = {0: [], 1: [], 2: []}
    try:
        for _ in range(repetitions):
            for pairs in rng.sample(list(samples), len(samples)):
                groups = [places[2 * i : 2 * i + 2] for i in range(pairs)] + [[place] for place in places[2 * pairs :]]
                reads = [(group, rng.randrange((size - 2 * nbytes) // BLOCK) * BLOCK) for group in groups]
                began = time.perf_counter()
                channel.put(reads, urgent=True)
                errors = [done.get() for _ in reads]
                samples[pairs].append(time.perf_counter() - began)
                for error in errors:
                    if error is not None:
                        raise error
    finally:
        channel.close()
        for thread in threads:
            thread.join()
        os.close(handle)
    apart, one, two = (median(each) for each in samples.values())
    return {"record_bytes": nbytes, "apart_s": apart, "one_pair_s": one, "two_pairs_s": two}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("trace", type=Path, help="a recorded routing trace (docs/traces.md)")
    parser.add_argument("checkpoint", type=Path, help="a folder with *.safetensors on the disk in question")
    parser.add_argument("--repetitions", type=int, default=300, help="of each reading (default 300)")
    args = parser.parse_args(argv)
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
