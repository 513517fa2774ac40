"""Decode with every scheduler at several link speeds: tokens/s of layers divided between accelerator and CPU.

    python scripts/bench/make_checkpoint.py --like gpt-oss-20b --layers 4 --out /data/gpt-oss-4l
    python scripts/bench/split.py /data/gpt-oss-4l --trace routing.safetensors

One process, one emulated accelerator: a core of its own, which computes like the CPU's. Schedulers take turns on the
same tokens; each begins with the cache that fetching everything has left, and has some tokens to learn what things cost
before those that count.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench.common import Args, Arguments, Result, ids_for, in_turn, medians, note, show
from scripts.bench.engines import decode, load, routed
from scripts.bench.storage import size_bytes

SCHEDULERS = ["gpu-only", "cpu-only", "ratio", "dali", "hybrimoe", "auto"]


def benchmark(args: Args) -> Result:
    """Every scheduler in turn, one link speed after the other."""
    return {"links": {link: _at(link, args) for link in args.links}}


def _at(link: str, args: Args) -> Result:
    """The figures at one speed."""
    whole, uncounted = size_bytes(args.checkpoint), args.fill + args.settle
    options: dict[str, Any] = {"gpu_mem": whole, "cpu_mem": whole + 3 * 10**9, "expert_cache": int(args.share * whole)}
    options |= {"device": "emulated", "link": link, "context": 256, "prefill": "on-demand"}
    note(f"{link}: bringing all experts into host memory")
    with closing(load("offload", args.checkpoint, **options)) as engine:
        decode(engine, ids_for(args.checkpoint, 200, 1))  # its own gates like all experts alike

        def window(scheduler: str, repetition: int) -> Result:
            ids, use = ids_for(args.checkpoint, uncounted + args.tokens, 2 + repetition), engine.model.use_scheduler
            before = {0: partial(use, "gpu-only"), args.fill: partial(use, scheduler)}
            with routed(engine, str(args.trace), first_sequence=repetition):
                answer = decode(engine, ids, warm_up=uncounted, before=before)
            stats = answer["stats"]
            on_cpu = stats["on_cpu"] / (stats["hits"] + stats["late_hits"] + stats["misses"])
            return {"tokens_per_s": 1 / answer["s_per_token"], "hit_rate": stats["hit_rate"], "on_cpu": on_cpu}

        rows = {name: medians(own) for name, own in in_turn(args.schedulers, args.repetitions, window).items()}
        costs, plan = engine.model.parts.steering.costs, engine.model.plan
    best = max(row["tokens_per_s"] for row in rows.values())
    rows = {name: row | {"of_best": row["tokens_per_s"] / best} for name, row in rows.items()}
    show(rows, link)
    one_s = costs and {
        "gpu_1": costs.gpu_s(1),
        "cpu_1": costs.cpu_s(1),
        "copy": costs.copy_s,
        "start": costs.cpu_start_s,
    }
    return {"costs_s": one_s, "schedulers": rows, "cached_share": plan.slots(plan.computing_tier) / plan.experts}


if __name__ == "__main__":
    arguments = Arguments(__doc__, "checkpoint", tokens=24, repetitions=3)
    arguments.positional("schedulers", f"default: {' '.join(SCHEDULERS)}", nargs="*", default=SCHEDULERS)
    arguments.option("--trace", None, "route by this trace's first layers", type=Path, required=True)
    arguments.option("--links", ["1GB/s", "3GB/s", "6GB/s"], "their speeds")
    arguments.option("--share", 0.25, "of the checkpoint's bytes on the accelerator")
    arguments.option("--fill", 12, "tokens of fetching everything before each")
    arguments.option("--settle", 8, "tokens that do not count")
    raise SystemExit(arguments.run(benchmark))
