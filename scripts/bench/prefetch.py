"""Prefetching live: stall and tokens/s by predictor and depth, against the same model with every expert in place.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 6 --out /data/qwen3-6l
    python scripts/bench/prefetch.py /data/qwen3-6l                    # an emulated accelerator, experts in RAM
    python scripts/bench/prefetch.py /data/qwen3-6l --device cpu       # the CPU, experts on disk
    python scripts/bench/prefetch.py /data/qwen3-6l --machine machine.json    # beside what a timed replay says

Fixed random tokens, one a step, each run from an empty KV cache; the model's own gates route. The first run records the
trace that the oracle knows, and what the gates said ahead. On an accelerator the link's speed is then set so that
fetching what a layer misses takes as long as computing the layer, and at the end to a quarter of it: a saturated link.
Configurations take turns. The bound, before and after, is a process that has every expert where it is computed. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.traces.trace import Trace
from cache.types import Tier
from offload.costs.machine import CopyTime, MachineProfile
from offload.costs.model import CostModel
from offload.decide.manager import Manager
from offload.decide.prefetch import Prefetcher
from offload.decide.stacks import Stacks
from offload.simulation.clock import run_timed
from offload.system.sizes import format_bytes, parse_bytes
from predictors.base import find_predictor, make_predictor
from predictors.evaluate import evaluate
from scripts.bench.common import Arguments, medians, note, random_ids, ratio, show, turns, vocabulary
from scripts.bench.serve import Answer
from scripts.bench.storage import drop_page_cache, shards, size_bytes
from scripts.bench.workers import Worker, engine_command

Configuration = tuple[str, int]
"""A predictor and its depth."""
GATE = "cross-layer-gate"
CONFIGURATIONS = (("none", 0), ("frequency", 1), (GATE, 1), (GATE, 2), (GATE, 3), ("oracle", 1), ("oracle", 3))
SATURATED = (("none", 0), (GATE, 2), ("oracle", 1))
COUNTED = ("hits", "late_hits", "misses", *(f"{kind}prefetches" for kind in ("", "useful_", "wasted_", "cancelled_")))

COLUMNS = ("s_per_token", "stall_s_per_token", "speedup", "share_of_bound", "predicted_s_per_token")


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Record, set the link, let the configurations take turns, and compare."""
    ids = random_ids(args.warm_up + args.tokens, vocabulary(args.checkpoint), 0)

    def bound() -> list[float]:
        with _worker(args, "resident") as resident:  # alone: both together may not fit this machine
            answers = [resident.ask(ids=ids, warm_up=args.warm_up) for _ in range(args.repetitions + 1)]
        return [mean(answer["seconds"]) for answer in answers[1:]]

    bounds = bound()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, _worker(args, "offload") as worker:
        path = Path(folder) / "trace.safetensors"
        worker.ask(ids=ids, record=str(path))
        trace, plan = Trace.open(path), worker.ask()["plan"]
        gate = make_predictor(GATE, trace.num_layers, trace.num_experts)
        result["gate_recall"] = evaluate(gate, trace).as_dict()["recall"]
        note(f"recall of the gates: {result['gate_recall']}")
        link = 0.0
        if args.device == "emulated":
            misses = _measured(worker, args, ids, path, ("none", 0))["misses_per_token"]
            link = result["link_bytes_per_s"] = misses * plan["slot_bytes"] / median(bounds)
        for name, part, configurations in (("rows", 1, CONFIGURATIONS), ("saturated", 4, SATURATED)):
            if link:
                note(f"link: {format_bytes(int(link / part))}/s")
                worker.ask(link=link / part)
            if link or part == 1:
                result[name] = _compare(worker, args, ids, path, configurations)
                if args.machine:
                    _predict(result[name], trace, plan, args, link / part)
        if args.keep_trace:
            shutil.copy(path, args.keep_trace)
    bounds += bound()
    for row in result["rows"]:
        row["share_of_bound"] = median(bounds) / row["s_per_token"]
    for name in (name for name in ("rows", "saturated") if name in result):
        show({f"{row['predictor']} {row['depth']}": row for row in result[name]}, name, COLUMNS)
    return result | {"resident_s_per_token": median(bounds)}


def _worker(args: argparse.Namespace, name: str) -> Worker:
    """The model with every expert in place, or with --expert-cache for them."""
    resident, more = name == "resident", 3 * 10**9
    options: dict[str, Any] = {"device": args.device, "context": args.warm_up + args.tokens + 16}
    if not resident:
        options["expert_cache"] = args.expert_cache
    if args.device == "emulated":
        whole = size_bytes(args.checkpoint)
        options["gpu_mem"] = (whole if resident else parse_bytes(args.expert_cache)) + more
        options["cpu_mem"] = (0 if resident else whole) + 2 * more
    return Worker(name, engine_command("offload", args.checkpoint, **options))


def _measured(
    worker: Worker, args: argparse.Namespace, ids: list[int], trace: Path, configuration: Configuration
) -> dict[str, Any]:
    """One run's figures."""
    name, depth = configuration
    predictor = {"predictor": name, "depth": depth or None, "profile": str(trace) if name == "oracle" else None}
    drop_page_cache(shards(args.checkpoint))
    answer: Answer = worker.ask(ids=ids, warm_up=args.warm_up, predictor=predictor)
    stats, s_per_token = answer["stats"], mean(answer["seconds"])
    note(f"{name} {depth}: {1 / s_per_token:.2f} tokens/s")
    counted = {f"{each}_per_token": stats[each] / args.tokens for each in ("stall_s", *COUNTED)}
    return {"s_per_token": s_per_token, **counted, "prefetch": stats["prefetch"]}


def _compare(
    worker: Worker, args: argparse.Namespace, ids: list[int], trace: Path, configurations: Sequence[Configuration]
) -> list[dict[str, Any]]:
    """Medians over repetitions, in which configurations take turns."""
    found: dict[Configuration, list[dict[str, Any]]] = {each: [] for each in configurations}
    for _, each in turns(configurations, args.repetitions):
        found[each].append(_measured(worker, args, ids, trace, each))
    rows = []
    for (predictor, depth), answers in found.items():
        prefetch = [answer.pop("prefetch") for answer in answers]
        speedup = ratio(*([one["s_per_token"] for one in side] for side in (found["none", 0], answers)))
        row = {"predictor": predictor, "depth": depth, **medians(answers)}
        rows.append(row | {"speedup": speedup, "prefetch": prefetch})
    return rows


def _predict(rows: list[dict[str, Any]], trace: Trace, plan: Any, args: argparse.Namespace, link: float) -> None:
    """Add what a timed replay of the recorded sequence says: twice, caches kept, the second time's measured tokens."""
    machine = MachineProfile.read(args.machine)
    tier = Tier.CPU if args.device == "cpu" else Tier.GPU
    if link and machine.link:
        machine = replace(machine, link=replace(machine.link, pinned=CopyTime(0.0, link)))
    work, slots = plan["work"], plan["pools"][0]["slots"][tier.value]
    dense = {name: work[name] for name in ("dense_layer_bytes", "dense_pass_bytes")}
    cost = CostModel(machine, expert_bytes=plan["slot_bytes"], tier=tier, **dense)
    for row in rows:
        rule = slots, row["predictor"], row["depth"]
        whole, before = (_seconds(_twice(trace, n), cost, *rule) for n in (trace.num_tokens, args.warm_up))
        row["predicted_s_per_token"] = (whole - before) / args.tokens


def _seconds(trace: Trace, cost: CostModel, slots: int, predictor: str, depth: int) -> float:
    """What all passes of `trace` take, with room for `slots` experts where they are computed, and all in RAM behind."""
    shape = trace.num_layers, trace.num_experts
    sizes = {cost.tier: slots} if cost.tier is Tier.CPU else {cost.tier: slots, Tier.CPU: shape[0] * shape[1]}
    caches = [
        ExpertCache(tier, [n * cost.expert_bytes], make_policy("lfru", Lanes.shared(*shape, n)))
        for tier, n in sizes.items()
    ]
    prefetcher = None
    if predictor != "none":
        known = None if find_predictor(predictor).causal else trace
        prefetcher = Prefetcher(make_predictor(predictor, *shape, known), min(depth, shape[0]))
    timeline = run_timed(
        trace, Manager(Stacks.single(caches, cost.expert_bytes), prefetcher=prefetcher), cost, cold=False
    )
    return sum(time.seconds for time in timeline.phases.values())


def _twice(trace: Trace, tokens: int) -> Trace:
    """The recorded sequence, and the first `tokens` of it again."""
    rows = np.r_[0 : trace.num_tokens, 0:tokens]
    return replace(
        trace,
        **{name: getattr(trace, name)[rows] for name in ("experts", "weights", "step", "phase")},
        predicted=None if trace.predicted is None else trace.predicted[rows],
        forward=None,
        sequence_offsets=np.array([0, trace.num_tokens, len(rows)]),
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, "checkpoint", tokens=48, warm_up=32, repetitions=3)
    arguments.option("--device", "emulated", "emulated, cpu or cuda")
    arguments.option("--expert-cache", "1800M", "of the offloaded model")
    arguments.option("--machine", None, "what `offload profile` stored: predict, too", type=Path)
    arguments.option("--keep-trace", None, "where to copy the recorded trace", type=Path)
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
