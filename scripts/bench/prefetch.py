"""Prefetching live: stall and tokens/s by predictor and depth, against the same model with every expert in place.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 6 --out /data/qwen3-6l
    python scripts/bench/prefetch.py /data/qwen3-6l                    # an emulated accelerator, experts in RAM
    python scripts/bench/prefetch.py /data/qwen3-6l --device cpu       # the CPU, experts on disk
    python scripts/bench/prefetch.py /data/qwen3-6l --machine machine.json    # beside what a timed replay says

Each run of the tokens begins with an empty KV cache. The first one records the trace that the oracle knows, and what
the gates said ahead. On an accelerator the link's speed is then set so that fetching what a layer misses takes as long
as computing the layer, and at the end to a quarter of it: a saturated link. The model with every expert in place is a
process of its own, before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from cache.traces.trace import DECODE, PER_TOKEN, Trace
from offload.costs.machine import CopyTime, MachineProfile
from offload.simulation.compare import replay_one
from offload.simulation.rows import Setting
from predictors.base import make_predictor
from predictors.evaluate import evaluate
from scripts.bench.common import Args, Arguments, Result, ids_for, in_turn, medians, note, ratio_of, show, size
from scripts.bench.storage import drop_page_cache, shards, size_bytes
from scripts.bench.workers import Worker, engine_command

Configuration = tuple[str, int]
"""A predictor and its depth."""
GATE = "cross-layer-gate"
CONFIGURATIONS = (("none", 0), ("frequency", 1), (GATE, 1), (GATE, 2), (GATE, 3), ("oracle", 1), ("oracle", 3))
SATURATED = (("none", 0), (GATE, 2), ("oracle", 1))
COUNTED = ("hits", "late_hits", "misses", *(f"{kind}prefetches" for kind in ("", "useful_", "wasted_", "cancelled_")))
COLUMNS = ("s_per_token", "stall_s_per_token", "speedup", "share_of_bound", "predicted_s_per_token")


def benchmark(args: Args) -> Result:
    """Record, set the link, let the configurations take turns, and compare."""
    ids = ids_for(args.checkpoint, args.warm_up + args.tokens, 0)
    bounds = _bound(args, ids)
    result: Result = {}
    with TemporaryDirectory() as folder, _worker(args, "offload") as worker:
        path = Path(folder) / "trace.safetensors"
        worker.ask(ids=ids, record=str(path))
        trace, plan = Trace.open(path), worker.ask()["plan"]
        gate = make_predictor(GATE, trace.num_layers, trace.num_experts)
        result["gate_recall"] = evaluate(gate, trace).as_dict()["recall"]
        note(f"recall of the gates: {result['gate_recall']}")

        def window(configuration: Configuration, repetition: int = 0) -> Result:
            name, depth = configuration
            predictor = {"predictor": name, "depth": depth or None, "profile": str(path) if name == "oracle" else None}
            drop_page_cache(shards(args.checkpoint))
            answer = worker.ask(ids=ids, warm_up=args.warm_up, predictor=predictor)
            counted = {f"{each}_per_token": answer["stats"][each] / args.tokens for each in ("stall_s", *COUNTED)}
            return {"s_per_token": answer["s_per_token"], **counted, "prefetch": answer["stats"]["prefetch"]}

        def compared(configurations: Sequence[Configuration], link: float | None) -> list[Result]:
            if link:
                worker.ask(link=link)
            rows = _rows(in_turn(configurations, args.repetitions, window))
            if args.machine:
                _predict(rows, trace, plan, args, link)
            return rows

        link = None
        if args.device == "emulated":
            misses = window(("none", 0))["misses_per_token"]
            link = result["link_bytes_per_s"] = misses * plan["slot_bytes"] / median(bounds)
        result["rows"] = compared(CONFIGURATIONS, link)
        if link:
            result["saturated"] = compared(SATURATED, link / 4)
    bounds += _bound(args, ids)
    for row in result["rows"]:
        row["share_of_bound"] = median(bounds) / row["s_per_token"]
    for name in (name for name in ("rows", "saturated") if name in result):
        show({f"{row['predictor']} {row['depth']}": row for row in result[name]}, name, COLUMNS)
    return result | {"resident_s_per_token": median(bounds)}


def _bound(args: Args, ids: list[int]) -> list[float]:
    """Seconds a token with every expert in place, of each repetition."""
    with _worker(args, "resident") as resident:  # alone: both together may not fit this machine
        answers = [resident.ask(ids=ids, warm_up=args.warm_up) for _ in range(args.repetitions + 1)]
    return [answer["s_per_token"] for answer in answers[1:]]


def _worker(args: Args, name: str) -> Worker:
    """The model with every expert in place, or with --expert-cache for them."""
    resident, more = name == "resident", 3 * 10**9
    options: dict[str, Any] = {"device": args.device, "context": args.warm_up + args.tokens + 16}
    if not resident:
        options["expert_cache"] = args.expert_cache
    if args.device == "emulated":
        whole = size_bytes(args.checkpoint)
        options["gpu_mem"] = (whole if resident else args.expert_cache) + more
        options["cpu_mem"] = (0 if resident else whole) + 2 * more
    return Worker(name, engine_command("offload", args.checkpoint, **options))


def _rows(found: dict[Configuration, list[Result]]) -> list[Result]:
    """Medians over the repetitions, and how much faster than without a predictor."""
    rows: list[Result] = []
    for (predictor, depth), own in found.items():
        prefetch = [row.pop("prefetch") for row in own]
        speedup = ratio_of("s_per_token", found["none", 0], own)
        rows.append({"predictor": predictor, "depth": depth, **medians(own), "speedup": speedup, "prefetch": prefetch})
    return rows


def _predict(rows: list[Result], trace: Trace, plan: Any, args: Args, link: float | None) -> None:
    """Add what a timed replay of the recorded sequence says: twice, caches kept, the second time's measured tokens."""
    machine, device = MachineProfile.read(args.machine), "cpu" if args.device == "cpu" else "gpu"
    if link and machine.link:
        machine = replace(machine, link=replace(machine.link, pinned=CopyTime(0.0, link)))
    dense = {name: plan["work"][name] for name in ("dense_layer_bytes", "dense_pass_bytes")}
    setting = Setting(pool="global", warm=True, timed=True, machine=machine, device=device, **dense)
    for row in rows:
        own = replace(setting, predictor=row["predictor"], prefetch_depth=row["depth"] or 1)
        seconds = []
        for routed in (_twice(trace, trace.num_tokens), _twice(trace, args.warm_up)):
            (replayed,) = replay_one(routed, "lfru", [str(plan["cache_bytes"][device])], own)
            assert replayed.tokens_per_s, "a machine is given"
            seconds.append(np.count_nonzero(routed.phase == DECODE) / replayed.tokens_per_s)
        row["predicted_s_per_token"] = (seconds[0] - seconds[1]) / args.tokens


def _twice(trace: Trace, tokens: int) -> Trace:
    """The recorded sequence, and the first `tokens` of it again."""
    rows = np.r_[0 : trace.num_tokens, 0:tokens]
    columns = {name: column[rows] for name in PER_TOKEN if (column := getattr(trace, name)) is not None}
    return replace(trace, **columns | {"forward": None}, sequence_offsets=np.array([0, trace.num_tokens, len(rows)]))


if __name__ == "__main__":
    arguments = Arguments(__doc__, "checkpoint", tokens=48, warm_up=32, repetitions=3)
    arguments.option("--device", "emulated", "emulated, cpu or cuda")
    arguments.option("--expert-cache", "1800M", "of the offloaded model", type=size)
    arguments.option("--machine", None, "what `offload profile` stored: predict, too", type=Path)
    raise SystemExit(arguments.run(benchmark))
