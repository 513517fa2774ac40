"""Decode with experts at several precisions and equal RAM: tokens/s, bytes read, and what ran at which precision.

    python scripts/bench/make_checkpoint.py --like gpt-oss-20b --layers 4 --out /data/gpt-oss-4l
    python scripts/bench/precision.py /data/gpt-oss-4l --trace routing.safetensors

Every configuration is a process of its own in a memory cgroup of the same size, with the same budget; they take turns,
repetition by repetition, on the same tokens. With a trace, tokens go where it says, so that caches see real locality. A
configuration is written as experts or experts/fallback. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

from offload.system.sizes import parse_bytes
from scripts.bench.common import (
    Answer,
    Request,
    Worker,
    default_threads,
    drop_page_cache,
    note,
    random_ids,
    run,
    serve,
    shards,
    worker_command,
)

DEFAULT = (
    "auto",
    "int8",
    "nf4",
    "int4",
    "auto,nf4/hobbit",
    "int8>int4/hobbit",
    "int8>int4/deadline",
    "int8>int4>int2/deadline",
)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Convert what must be, load every configuration, let them take turns."""
    from offload.costs.precision import parse_precisions
    from offload.options import PlanOptions
    from offload.plan.conversion import convert_model

    files = shards(args.checkpoint)
    for experts in dict.fromkeys(each.partition("/")[0] for each in args.configurations):
        wanted = [name for name in experts.split(",") if name != "auto"]
        if parse_precisions(experts) and wanted:
            note(f"converting to {','.join(wanted)}")
            convert_model(args.checkpoint, PlanOptions(experts=",".join(wanted)), progress=sys.stderr.isatty())
    ids = random_ids(args.warm_up + args.tokens * args.repetitions, 30000, args.seed)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in args.configurations}
    with ExitStack() as stack:
        workers = {}
        for name in args.configurations:
            note(f"loading {name}")
            command = worker_command(__file__, args.argv, "--worker", name)
            workers[name] = stack.enter_context(Worker(name, command, parse_bytes(args.memory, "--memory")))
            workers[name].ask(ids=ids[: args.warm_up])
        for repetition in range(args.repetitions):
            start = args.warm_up + repetition * args.tokens
            turn = args.configurations if repetition % 2 == 0 else reversed(args.configurations)
            for name in turn:
                drop_page_cache(files)
                answers[name].append(workers[name].ask(ids=ids[start : start + args.tokens]))
                note(f"repetition {repetition + 1}: {name} {1 / mean(answers[name][-1]['seconds']):.2f} tokens/s")
        peaks = {name: usage.peak_bytes for name, worker in workers.items() if (usage := worker.usage())}
    return {
        "benchmark": "precision",
        "checkpoint": args.checkpoint.name,
        "trace": None if args.trace is None else args.trace.name,
        "device": args.device,
        "memory_bytes": parse_bytes(args.memory),
        "cpu_mem_bytes": parse_bytes(args.cpu_mem),
        "threads": args.threads,
        "tokens": args.tokens,
        "configurations": {name: _summary(rows) for name, rows in answers.items()},
        "cgroup_peak_bytes": peaks,
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over repetitions, and what all of them did together."""
    tokens = sum(len(row["seconds"]) for row in rows)
    uses: dict[str, int] = {}
    for row in rows:
        for precision, count in row["stats"]["precision_uses"].items():
            uses[precision] = uses.get(precision, 0) + count
    total = sum(uses.values()) or 1
    return {
        "tokens_per_s": median(1 / mean(row["seconds"]) for row in rows),
        "read_bytes_per_token": sum(row["stats"]["bytes_from_disk"] for row in rows) / tokens,
        "link_bytes_per_token": sum(row["stats"]["bytes_over_link"] for row in rows) / tokens,
        "hit_rate": median(row["stats"]["hit_rate"] for row in rows),
        "precision_shares": {precision: count / total for precision, count in uses.items()},
        "repetitions": [1 / mean(row["seconds"]) for row in rows],
    }


def engine(args: argparse.Namespace) -> Callable[[Request], Answer]:
    """Load the worker's model, routed by the trace."""
    from cache.traces.trace import Trace
    from offload.model import OffloadedModel
    from offload.traces.router import TraceRouter
    from scripts.bench import engines

    experts, _, fallback = args.worker.partition("/")
    model = OffloadedModel.from_pretrained(
        args.checkpoint,
        cpu_mem=args.cpu_mem,
        gpu_mem=args.gpu_mem,
        link=args.link,
        context=max(args.warm_up, args.tokens),
        device=args.device,
        threads=None if args.device == "emulated" else args.threads,
        experts=experts,
        fallback=fallback or "none",
    )
    if args.trace is not None:
        TraceRouter(model, Trace.open(args.trace), layers=range(model.plan.layers)).__enter__()
    return engines.handler(
        engines.Engine(
            forward=model.forward,
            config=model.config,
            chunk=model.plan.chunk,
            stats=lambda: model.stats.as_dict(),
            reset=model.reset_stats,
            close=model.close,
        )
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder that scripts/bench/make_checkpoint.py wrote")
    parser.add_argument("configurations", nargs="*", help="experts, or experts/fallback", default=list(DEFAULT))
    parser.add_argument("--trace", type=Path, help="route by this trace's first layers")
    parser.add_argument("--memory", default="2500M", help="each one's memory cgroup (default 2500M)")
    parser.add_argument("--cpu-mem", default="2400M", help="the budget inside it (default 2400M)")
    parser.add_argument("--device", default="cpu", help="cpu, emulated or cuda (default cpu)")
    parser.add_argument("--gpu-mem", help="the accelerator's budget")
    parser.add_argument("--link", help="speed of the emulated accelerator's link")
    parser.add_argument("--tokens", type=int, default=32, help="measured tokens a repetition (default 32)")
    parser.add_argument("--warm-up", type=int, default=32, help="tokens before the first (default 32)")
    parser.add_argument("--repetitions", type=int, default=3, help="default 3")
    parser.add_argument("--threads", type=int, default=default_threads(), help="default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens (default 0)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.worker:
        return serve(lambda: engine(args))
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
