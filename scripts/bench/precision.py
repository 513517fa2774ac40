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
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

from offload.costs.precision import parse_precisions
from offload.options import PlanOptions
from offload.plan.conversion import convert_model
from offload.system.sizes import parse_bytes
from scripts.bench.common import Arguments, note, show, turns, windows
from scripts.bench.serve import Answer
from scripts.bench.storage import drop_page_cache, shards
from scripts.bench.workers import Worker, engine_command

DEFAULT = (
    *("auto", "int8", "nf4", "int4", "auto,nf4/hobbit"),
    *("int8>int4/hobbit", "int8>int4/deadline", "int8>int4>int2/deadline"),
)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Convert what must be, load every configuration, let them take turns."""
    for experts in dict.fromkeys(each.partition("/")[0] for each in args.configurations):
        wanted = ",".join(name for name in experts.split(",") if name != "auto")
        if parse_precisions(experts) and wanted:
            note(f"converting to {wanted}")
            convert_model(args.checkpoint, PlanOptions(experts=wanted), progress=sys.stderr.isatty())
    warm_up, parts = windows(args)
    answers: dict[str, list[Answer]] = {name: [] for name in args.configurations}
    routed = {} if args.trace is None else {"trace": str(args.trace)}
    with ExitStack() as stack:
        workers = {}
        for name in args.configurations:
            worker = Worker(name, _command(name, args), parse_bytes(args.memory, "--memory"))
            workers[name] = stack.enter_context(worker)
            worker.ask(ids=warm_up, **routed)
        for repetition, name in turns(workers, args.repetitions):
            drop_page_cache(shards(args.checkpoint))
            answer = workers[name].ask(ids=parts[repetition], first_sequence=repetition + 1, **routed)
            answers[name].append(answer)
            note(f"repetition {repetition + 1}: {name} {1 / mean(answer['seconds']):.2f} tokens/s")
        peaks = {name: usage.peak_bytes for name, worker in workers.items() if (usage := worker.usage())}
    rows = {name: _summary(each) for name, each in answers.items()}
    show(rows)
    return {"configurations": rows, "cgroup_peak_bytes": peaks}


def _command(name: str, args: argparse.Namespace) -> list[str]:
    """A configuration's worker."""
    experts, _, fallback = name.partition("/")
    return engine_command(
        "offload",
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


def _summary(rows: list[Answer]) -> dict[str, Any]:
    """Medians over repetitions, and what all of them did together."""
    tokens = sum(len(row["seconds"]) for row in rows)
    uses = sum((Counter(row["stats"]["precision_uses"]) for row in rows), Counter())
    return {
        "tokens_per_s": median(1 / mean(row["seconds"]) for row in rows),
        "read_bytes_per_token": sum(row["stats"]["bytes_from_disk"] for row in rows) / tokens,
        "link_bytes_per_token": sum(row["stats"]["bytes_over_link"] for row in rows) / tokens,
        "hit_rate": median(row["stats"]["hit_rate"] for row in rows),
        "precision_shares": {precision: count / uses.total() for precision, count in uses.items()},
        "repetitions": [1 / mean(row["seconds"]) for row in rows],
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, "checkpoint", tokens=32, warm_up=32, repetitions=3, threads=None)
    arguments.positional("configurations", "experts, or experts/fallback", nargs="*", default=list(DEFAULT))
    arguments.option("--trace", None, "route by this trace's first layers", type=Path)
    arguments.option("--memory", "2500M", "each one's memory cgroup")
    arguments.option("--cpu-mem", "2400M", "the budget inside it")
    arguments.option("--device", "cpu", "cpu, emulated or cuda")
    arguments.option("--gpu-mem", None, "the accelerator's budget")
    arguments.option("--link", None, "speed of the emulated accelerator's link")
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
