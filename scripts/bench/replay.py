"""Counting replay: accesses per second, beside libCacheSim's where that is installed, all on one core.

    python scripts/bench/replay.py routing.safetensors
    python scripts/bench/replay.py --tables ROWS.json...    what `offload replay --json` said, as Markdown

Ours replays every sequence and layer cold, event by event, at one capacity (a quarter of the experts) and at ten at
once, where each access counts ten times. libCacheSim replays the same accesses one by one, each layer's from a file of
its own, reading included. They take turns; seconds are the processor's, figures are medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.counting.counting import count
from cache.policy import find_policy
from cache.traces.passes import one_by_one
from cache.traces.trace import Trace
from scripts.bench.common import Arguments, Row, markdown, note, ratio, show, take_turns, timed

THEIRS = {name.lower(): name for name in ("FIFO", "LRU", "LFU", "SLRU", "ARC", "Sieve", "Belady")}
"""Policies that libCacheSim has too, and what it calls them."""
_RECORD = [("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")]  # "oracleGeneral"


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Time every policy in turn, and compare where there is something to compare with."""
    for policy in args.policies:
        find_policy(policy)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    trace = Trace.open(args.trace)
    accesses, one = trace.experts.size, max(1, trace.num_experts // 4)
    ten = sorted({max(1, round(trace.num_experts * i / 11)) for i in range(1, 11)})
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[tuple[str, str], Callable[[], float]] = {}
        for policy in args.policies:
            for name, slots in (("one", [one]), ("ten", ten)):
                capacities = [[n] * trace.num_layers for n in slots]
                ways[policy, name] = timed(partial(count, trace, policy, capacities), time.process_time)
            if theirs := libcachesim(trace, policy, one, Path(folder)):
                ways[policy, "theirs"] = timed(theirs, time.process_time)
        seconds = take_turns(ways, args.repetitions)
    result: dict[str, dict[str, float]] = {}
    for policy in args.policies:
        row = {"accesses_per_s": accesses / median(seconds[policy, "one"])}
        row["accesses_per_s_at_ten"] = len(ten) * accesses / median(seconds[policy, "ten"])
        if (policy, "theirs") in seconds:
            row["libcachesim_accesses_per_s"] = accesses / median(seconds[policy, "theirs"])
            row["ratio"] = ratio(seconds[policy, "theirs"], seconds[policy, "one"])
        result[policy] = row
    show(result)
    return {"accesses": accesses, "slots": one, "ten": ten, "policies": result}


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
        if not (folder / str(layer)).exists():
            write_requests(requests[:, layer], folder / str(layer))

    def replay() -> None:
        for layer in range(trace.num_layers):
            reader = simulator.TraceReader(str(folder / str(layer)), simulator.TraceType.ORACLE_GENERAL_TRACE)
            getattr(simulator, name)(slots, hashpower=8).process_trace(reader)

    return replay


def write_requests(experts: NDArray[Any], path: Path) -> None:
    """One layer's accesses as a file of libCacheSim's, objects of size 1, with the time of each one's next use."""
    rows = np.zeros(len(experts), _RECORD)
    rows["id"], rows["size"], rows["next"] = experts + 1, 1, np.iinfo(np.int64).max
    for expert in np.unique(experts):
        uses = np.flatnonzero(experts == expert)
        rows["next"][uses[:-1]] = uses[1:]
    rows.tofile(path)


def table(rows: list[Row]) -> str:
    """Rows of one trace and setting: hit rate (gap closed to Belady; of those that bypass, to Belady with bypass)."""
    by_policy: dict[str, dict[str, Row]] = {}
    for row in rows:
        marks = {"offline": not row["causal"], "bypass": row["admission"] == "bypass", "trained": row["profile"]}
        said = ", ".join(mark for mark, has in marks.items() if has)
        by_policy.setdefault(f"`{row['policy']}`" + (f" ({said})" if said else ""), {})[row["capacity"]] = row
    capacities = list(dict.fromkeys(row["capacity"] for row in rows))
    middle = capacities[len(capacities) // 2]
    best_first = sorted(by_policy.items(), key=lambda item: -item[1][middle]["hits"])
    return markdown(
        ["policy", *capacities], ([label, *(_cell(here[each]) for each in capacities)] for label, here in best_first)
    )


def _cell(row: Row) -> str:
    gap = row["gap_closed_bypass" if row["admission"] == "bypass" else "gap_closed"]
    return f"{row['hit_rate']:.4f}" + ("" if gap is None else f" ({gap:.0%})")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, repetitions=5)
    arguments.positional("trace", "a recorded routing trace", type=Path, nargs="?")
    arguments.names("--policies", ("lru", "lfu", "mrs", "lfru", "belady"), "names")
    arguments.option("--tables", None, "files with rows of replays, to print as tables instead", type=Path, nargs="+")
    args = arguments.parse(argv)
    if not args.tables:
        return arguments.run(benchmark, argv) if args.trace else arguments.error("give a trace, or --tables")
    for path in args.tables:
        rows = json.loads(path.read_text(encoding="utf-8"))
        first = rows[0]
        mode = f"{first['pool']} pool, {'warm' if first['warm'] else 'cold'}, {first['accesses']:,} accesses"
        print(f"{Path(first['trace']).name}, {mode}\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
