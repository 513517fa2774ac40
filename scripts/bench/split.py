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
from pathlib import Path
from statistics import mean, median
from typing import Any

from offload.system.sizes import parse_rate
from scripts.bench.common import note, random_ids, run, shards

SCHEDULERS = ("gpu-only", "cpu-only", "ratio", "dali", "hybrimoe", "auto")


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Load once; per link speed and repetition every scheduler in turn."""
    from cache.traces.trace import Trace
    from offload.device.emulated import EmulatedDevice
    from offload.model import OffloadedModel
    from offload.traces.router import TraceRouter
    from scripts.bench import engines

    whole = sum(path.stat().st_size for path in shards(args.checkpoint))
    model = OffloadedModel.from_pretrained(
        args.checkpoint,
        device="emulated",
        link=args.links[0],
        gpu_mem=whole,
        cpu_mem=whole + 3 * 10**9,
        expert_cache=int(args.share * whole),
        context=256,
        policy=args.policy,
        experts=args.experts,
        prefill="on-demand",
    )
    device = model.parts.device
    assert isinstance(device, EmulatedDevice)
    engine = engines.Engine(model.forward, model.config)
    trace = Trace.open(args.trace)
    count = args.fill + args.settle + args.tokens
    result: dict[str, Any] = {
        "benchmark": "split",
        "checkpoint": args.checkpoint.name,
        "trace": args.trace.name,
        "experts": args.experts,
        "cached_share": model.plan.slots(model.plan.computing_tier) / model.plan.experts,
        "links": {},
    }
    note("bringing all experts into host memory")
    ids = random_ids(args.repetitions * count, 30000, 0)
    everything = random_ids(200, 30000, 1)
    for _ in engines.steps(engine, everything):  # by the model's own gates, which like all experts alike
        pass

    def measure(scheduler: str, repetition: int) -> tuple[float, dict[str, Any]]:
        tokens = ids[repetition * count : (repetition + 1) * count]
        seconds = []
        with TraceRouter(model, trace, layers=range(model.plan.layers), first_sequence=repetition):
            model.use_scheduler("gpu-only")
            for index, (step, _) in enumerate(engines.steps(engine, tokens)):
                if index == args.fill:
                    model.use_scheduler(scheduler)
                if index == args.fill + args.settle:
                    model.reset_stats()
                if index >= args.fill + args.settle:
                    seconds.append(step)
        return 1 / mean(seconds), model.stats.as_dict()

    for link in args.links:
        device.link_bytes_per_s = parse_rate(link)
        model.parts.steering.costs = None  # measured for another link
        found: dict[str, list[float]] = {name: [] for name in args.schedulers}
        shares: dict[str, list[tuple[float, float]]] = {name: [] for name in args.schedulers}
        for repetition in range(args.repetitions):
            for name in args.schedulers if repetition % 2 == 0 else reversed(args.schedulers):
                speed, stats = measure(name, repetition)
                found[name].append(speed)
                accesses = stats["hits"] + stats["late_hits"] + stats["misses"]
                shares[name].append((stats["hit_rate"], stats["on_cpu"] / accesses))
                note(f"{link} {repetition + 1}: {name} {speed:.2f} tokens/s")
        costs = model.parts.steering.costs
        best = max(median(speeds) for speeds in found.values())
        result["links"][link] = {
            "costs_s": None
            if costs is None
            else {
                "gpu_1": costs.gpu_s(1), "cpu_1": costs.cpu_s(1), "copy": costs.copy_s, "start": costs.cpu_start_s,
            },
            "schedulers": {
                name: {
                    "tokens_per_s": median(speeds),
                    "of_best": median(speeds) / best,
                    "hit_rate": median(hits for hits, _ in shares[name]),
                    "on_cpu": median(on_cpu for _, on_cpu in shares[name]),
                    "repetitions": speeds,
                }
                for name, speeds in found.items()
            },
        }  # fmt: skip
    model.close()
    return result


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder that scripts/bench/make_checkpoint.py wrote")
    parser.add_argument("schedulers", nargs="*", default=list(SCHEDULERS))
    parser.add_argument("--trace", type=Path, required=True, help="route by this trace's first layers")
    parser.add_argument("--links", nargs="+", default=["1GB/s", "3GB/s", "6GB/s"], help="default 1, 3 and 6 GB/s")
    parser.add_argument("--share", type=float, default=0.25, help="of the checkpoint's bytes on the accelerator")
    parser.add_argument("--experts", default="auto", help="their precision (default auto)")
    parser.add_argument("--policy", default="lfru", help="default lfru")
    parser.add_argument("--fill", type=int, default=12, help="tokens of fetching everything before each (default 12)")
    parser.add_argument("--settle", type=int, default=8, help="tokens that do not count (default 8)")
    parser.add_argument("--tokens", type=int, default=24, help="measured tokens (default 24)")
    parser.add_argument("--repetitions", type=int, default=3, help="default 3")
    args = parser.parse_args(argv)
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
