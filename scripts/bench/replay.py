"""Counting replay: accesses per second, beside libCacheSim's where that is installed, all on one core.

    python scripts/bench/replay.py routing.safetensors

Ours replays every sequence and layer cold, event by event, at one capacity (a quarter of the experts) and at ten at
once, where each access counts ten times. libCacheSim replays the same accesses one by one, each layer's from a file of
its own, reading included. They take turns; seconds are the processor's, figures are medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.counting.counting import count
from cache.policy import find_policy
from cache.traces.passes import one_by_one
from cache.traces.trace import Trace
from scripts.bench.common import note, run

DEFAULT = ("lru", "lfu", "mrs", "lfru", "belady")
THEIRS = {
    "fifo": "FIFO",
    "lru": "LRU",
    "lfu": "LFU",
    "slru": "SLRU",
    "arc": "ARC",
    "sieve": "Sieve",
    "belady": "Belady",
}
_RECORD = [("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")]  # "oracleGeneral"
_NEVER = np.iinfo(np.int64).max


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Time every policy in turn, and compare where there is something to compare with."""
    for policy in args.policies:
        find_policy(policy)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    trace = Trace.open(args.trace)
    experts = trace.num_experts
    one = [max(1, experts // 4)]
    ten = sorted({max(1, round(experts * i / 11)) for i in range(1, 11)})
    with tempfile.TemporaryDirectory() as folder:
        contenders: dict[str, tuple[int, Callable[[], object]]] = {}
        for policy in args.policies:
            for slots in (one, ten):
                contenders[f"{policy} at {len(slots)}"] = (len(slots), ours(trace, policy, slots))
            theirs = libcachesim(trace, policy, one[0], Path(folder))
            if theirs:
                contenders[f"{policy} by libcachesim"] = (1, theirs)
        rates = take_turns(contenders, trace.experts.size, args.repetitions)
    medians = {name: median(values) for name, values in rates.items()}
    result: dict[str, Any] = {}
    for policy in args.policies:
        row = {"accesses_per_s": medians[f"{policy} at 1"], "accesses_per_s_at_ten": medians[f"{policy} at {len(ten)}"]}
        if (name := f"{policy} by libcachesim") in rates:
            row["libcachesim_accesses_per_s"] = medians[name]
            row["ratio"] = median(a / b for a, b in zip(rates[f"{policy} at 1"], rates[name], strict=True))
        result[policy] = row
    return {
        "benchmark": "replay",
        "trace": args.trace.name,
        "accesses": trace.experts.size,
        "slots": one[0],
        "ten": ten,
        "repetitions": args.repetitions,
        "policies": result,
    }


def take_turns(
    contenders: dict[str, tuple[int, Callable[[], object]]], accesses: int, repetitions: int
) -> dict[str, list[float]]:
    """Accesses per second of processor time by contender and repetition; a replay is so many times `accesses`."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(repetitions):
        for name in contenders if repetition % 2 == 0 else reversed(contenders):
            times, replay = contenders[name]
            began = time.process_time()
            replay()
            rates[name].append(times * accesses / (time.process_time() - began))
            note(f"repetition {repetition + 1}: {name}: {rates[name][-1] / 1e6:.2f} M accesses/s")
    return rates


def ours(trace: Trace, policy: str, slots: list[int]) -> Callable[[], object]:
    """A replay at `slots` experts a layer."""
    return lambda: count(trace, policy, [[n] * trace.num_layers for n in slots])


def libcachesim(trace: Trace, policy: str, slots: int, folder: Path) -> Callable[[], object] | None:
    """The same accesses in libCacheSim; None where it is not installed or does not have the policy."""
    try:
        import libcachesim as simulator
    except ImportError:
        note("libcachesim is not installed: nothing to compare with")
        return None
    name = THEIRS.get(policy)
    if name is None:
        return None
    requests = one_by_one(trace).experts[:, :, 0]
    for layer in range(trace.num_layers):
        path = folder / str(layer)
        if not path.exists():
            write_requests(requests[:, layer], path)

    def replay() -> None:
        for layer in range(trace.num_layers):
            reader = simulator.TraceReader(str(folder / str(layer)), simulator.TraceType.ORACLE_GENERAL_TRACE)
            getattr(simulator, name)(slots, hashpower=8).process_trace(reader)

    return replay


def write_requests(experts: NDArray[Any], path: Path) -> None:
    """One layer's accesses as a file of libCacheSim's, objects of size 1, with the time of each one's next use."""
    rows = np.zeros(len(experts), _RECORD)
    rows["id"], rows["size"], rows["next"] = experts, 1, _NEVER
    for expert in np.unique(experts):
        uses = np.flatnonzero(experts == expert)
        rows["next"][uses[:-1]] = uses[1:]
    rows["id"] += 1
    rows.tofile(path)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("trace", type=Path, help="a recorded routing trace")
    parser.add_argument(
        "--policies",
        type=lambda text: text.split(","),
        default=list(DEFAULT),
        help=f"names, with commas between (default {','.join(DEFAULT)})",
    )
    parser.add_argument("--repetitions", type=int, default=5, help="default 5")
    args = parser.parse_args(argv)
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
