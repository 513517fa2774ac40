"""Decode with every scheduler at several link speeds: tokens/s of layers divided between accelerator and CPU.

    python scripts/bench/make_checkpoint.py --like gpt-oss-20b --layers 4 --out /data/gpt-oss-4l
    python scripts/bench/split.py /data/gpt-oss-4l --trace routing.safetensors

One process, one emulated accelerator: a core of its own, which computes like the CPU's. All experts are in host memory,
a share of them on the accelerator. Schedulers take turns, repetition by repetition, on the same tokens; each begins
with the cache that fetching everything has left, and has some tokens to learn what things cost before those that count.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from scripts.bench.common import Arguments, medians, note, random_ids, show, turns, vocabulary
from scripts.bench.engines import Engine, decode, load, routed
from scripts.bench.storage import size_bytes

SCHEDULERS = ("gpu-only", "cpu-only", "ratio", "dali", "hybrimoe", "auto")


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """For each link speed and repetition every scheduler in turn."""
    whole, links = size_bytes(args.checkpoint), {}
    for link in args.links:
        options: dict[str, Any] = {"policy": args.policy, "experts": args.experts, "prefill": "on-demand"}
        options |= {"gpu_mem": whole, "cpu_mem": whole + 3 * 10**9, "expert_cache": int(args.share * whole)}
        note(f"{link}: bringing all experts into host memory")
        with closing(load("offload", args.checkpoint, device="emulated", link=link, context=256, **options)) as engine:
            plan = engine.model.plan
            decode(engine, random_ids(200, vocabulary(args.checkpoint), 1))  # its own gates like all experts alike
            found: dict[str, list[dict[str, float]]] = {name: [] for name in args.schedulers}
            for repetition, name in turns(args.schedulers, args.repetitions):
                found[name].append(_window(engine, name, repetition, args))
                note(f"{link} {repetition + 1}: {name} {found[name][-1]['tokens_per_s']:.2f} tokens/s")
            costs = engine.model.parts.steering.costs
        best = max(median(row["tokens_per_s"] for row in rows) for rows in found.values())
        schedulers: dict[str, dict[str, Any]] = {name: {**medians(rows)} for name, rows in found.items()}
        for row in schedulers.values():
            row["of_best"] = row["tokens_per_s"] / best
        show(schedulers, link)
        links[link] = {"costs_s": costs and _seconds(costs), "schedulers": schedulers}
    return {"cached_share": plan.slots(plan.computing_tier) / plan.experts, "links": links}


def _window(engine: Engine, scheduler: str, repetition: int, args: argparse.Namespace) -> dict[str, float]:
    """One scheduler's figures."""
    count, use = args.fill + args.settle + args.tokens, engine.model.use_scheduler
    with routed(engine, str(args.trace), first_sequence=repetition):
        answer = decode(
            engine,
            random_ids(count, vocabulary(args.checkpoint), 2 + repetition),
            warm_up=args.fill + args.settle,
            before={0: partial(use, "gpu-only"), args.fill: partial(use, scheduler)},
        )
    stats = answer["stats"]
    on_cpu = stats["on_cpu"] / (stats["hits"] + stats["late_hits"] + stats["misses"])
    return {"tokens_per_s": 1 / mean(answer["seconds"]), "hit_rate": stats["hit_rate"], "on_cpu": on_cpu}


def _seconds(costs: Any) -> dict[str, float]:
    """What was measured of one expert."""
    return {"gpu_1": costs.gpu_s(1), "cpu_1": costs.cpu_s(1), "copy": costs.copy_s, "start": costs.cpu_start_s}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, "checkpoint", tokens=24, repetitions=3)
    arguments.positional("schedulers", f"default: {' '.join(SCHEDULERS)}", nargs="*", default=list(SCHEDULERS))
    arguments.option("--trace", None, "route by this trace's first layers", type=Path, required=True)
    arguments.option("--links", ["1GB/s", "3GB/s", "6GB/s"], "their speeds")
    arguments.option("--share", 0.25, "of the checkpoint's bytes on the accelerator")
    arguments.option("--experts", "auto", "their precision")
    arguments.option("--policy", "lfru", "what leaves the accelerator")
    arguments.option("--fill", 12, "tokens of fetching everything before each")
    arguments.option("--settle", 8, "tokens that do not count")
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
