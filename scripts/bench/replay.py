"""Counting replay: accesses per second, beside libCacheSim's where that is installed, all on one core.

    python scripts/bench/replay.py routing.safetensors
    python scripts/bench/replay.py --tables ROWS.json...    what `offload replay --json` said, as Markdown

Ours replays every sequence and layer cold, event by event, at one capacity (a quarter of the experts) and at ten at
once, where each access counts ten times. libCacheSim replays the same accesses one by one, each layer's from a file of
its own, reading included. Seconds are the processor's.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from cache.counting.counting import count
from cache.traces.one_by_one import one_by_one
from cache.traces.trace import Trace
from scripts.bench.common import Args, Arguments, Result, Row, markdown, note, ratio, run, show, take_turns, timed

THEIRS = {name.lower(): name for name in ("FIFO", "LRU", "LFU", "SLRU", "ARC", "Sieve", "Belady")}
"""Policies that libCacheSim has too, and what it calls them."""
_RECORD = [("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")]  # "oracleGeneral"


def benchmark(args: Args) -> Result:
    """Time every policy in turn, and compare where there is something to compare with."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    trace = Trace.open(args.trace)
    accesses, one = trace.experts.size, max(1, trace.num_experts // 4)
    ten = sorted({max(1, round(trace.num_experts * i / 11)) for i in range(1, 11)})
    ways: dict[tuple[str, str], Callable[[], object]] = {}
    with TemporaryDirectory() as folder:
        for policy in args.policies:
            for name, slots in (("one", [one]), ("ten", ten)):
                ways[policy, name] = partial(count, trace, policy, [[n] * trace.num_layers for n in slots])
        if find_spec("libcachesim"):
            files = write_requests(trace, Path(folder))
            known = [policy for policy in args.policies if policy in THEIRS]
            ways |= {(policy, "theirs"): partial(libcachesim, files, policy, one) for policy in known}
        else:
            note("libcachesim is not installed: nothing to compare with")
        seconds = take_turns({way: timed(action, time.process_time) for way, action in ways.items()}, args.repetitions)
    rows: dict[str, dict[str, float]] = {}
    for policy in args.policies:
        rows[policy] = {
            "accesses_per_s": accesses / median(seconds[policy, "one"]),
            "accesses_per_s_at_ten": len(ten) * accesses / median(seconds[policy, "ten"]),
        }
        if theirs := seconds.get((policy, "theirs")):
            rows[policy]["libcachesim_accesses_per_s"] = accesses / median(theirs)
            rows[policy]["ratio"] = ratio(theirs, seconds[policy, "one"])
    show(rows)
    return {"accesses": accesses, "slots": one, "ten": ten, "policies": rows}


def libcachesim(files: Iterable[Path], policy: str, slots: int) -> None:
    """The accesses in `files`, a layer each, in libCacheSim."""
    import libcachesim as simulator

    for file in files:
        reader = simulator.TraceReader(str(file), simulator.TraceType.ORACLE_GENERAL_TRACE)
        getattr(simulator, THEIRS[policy])(slots, hashpower=8).process_trace(reader)


def write_requests(trace: Trace, folder: Path) -> list[Path]:
    """Each layer's accesses as a file of libCacheSim's, objects of size 1, with the time of each one's next use."""
    requests = one_by_one(trace).experts[:, :, 0]
    for layer, experts in enumerate(requests.T):
        rows = np.zeros(len(experts), _RECORD)
        rows["id"], rows["size"], rows["next"] = experts + 1, 1, np.iinfo(np.int64).max
        for expert in np.unique(experts):
            uses = np.flatnonzero(experts == expert)
            rows["next"][uses[:-1]] = uses[1:]
        rows.tofile(folder / str(layer))
    return [folder / str(layer) for layer in range(trace.num_layers)]


def print_tables(paths: Iterable[Path]) -> None:
    """The tables of files with rows of replays."""
    for path in paths:
        rows = json.loads(path.read_text(encoding="utf-8"))
        first = rows[0]
        mode = f"{first['pool']} pool, {'warm' if first['warm'] else 'cold'}, {first['accesses']:,} accesses"
        print(f"{Path(first['trace']).name}, {mode}\n\n{table(rows)}")


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


if __name__ == "__main__":
    arguments = Arguments(__doc__, repetitions=5)
    arguments.positional("trace", "a recorded routing trace", type=Path, nargs="?")
    arguments.option("--policies", ["lru", "lfu", "mrs", "lfru", "belady"], "names")
    arguments.option("--tables", None, "files with rows of replays, to print as tables instead", type=Path, nargs="+")
    args = arguments.parse()
    if args.tables:
        print_tables(args.tables)
    elif args.trace:
        raise SystemExit(run(benchmark, args))
    else:
        arguments.error("give a trace, or --tables")
