"""Decode with experts at several precisions and equal RAM: tokens/s, bytes read, and what ran at which precision.

    python scripts/bench/make_checkpoint.py --like gpt-oss-20b --layers 4 --out /data/gpt-oss-4l
    python scripts/bench/precision.py /data/gpt-oss-4l --trace routing.safetensors

Every configuration is a process of its own in a memory cgroup of the same size, with the same budget; they take turns
on the same tokens. With a trace, tokens go where it says, so that caches see real locality.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from scripts.bench.common import Args, Arguments, Result, in_turn, show, size, windows
from scripts.bench.serve import Answer
from scripts.bench.storage import drop_page_cache, shards
from scripts.bench.workers import Worker, engine_command

DEFAULT = [
    *("auto", "int8", "nf4", "auto,nf4/hobbit", "auto,nf4/deadline"),
    *("int8>int4/hobbit", "int8>int4/deadline", "int4>int2/hobbit"),
]


def benchmark(args: Args) -> Result:
    """Load every configuration, and let them take turns."""
    warm_up, parts = windows(args)
    routed = {} if args.trace is None else {"trace": str(args.trace)}
    with ExitStack() as stack:
        workers = {}
        for name in args.configurations:
            experts, _, fallback = name.partition("/")
            options = {"experts": experts, "fallback": fallback or "none", "device": "cpu", "cpu_mem": args.cpu_mem}
            options |= {"context": max(args.warm_up, args.tokens), "threads": args.threads}
            command = engine_command("offload", args.checkpoint, **options)
            with Worker(f"{name}, which converts what is missing", command) as converting:
                converting.ask()
            workers[name] = stack.enter_context(Worker(name, command, args.memory))
            workers[name].ask(ids=warm_up, **routed)

        def window(name: str, repetition: int) -> Answer:
            drop_page_cache(shards(args.checkpoint))
            return workers[name].ask(ids=parts[repetition], first_sequence=repetition + 1, **routed)

        answers = in_turn(workers, args.repetitions, window)
        peaks = {name: usage.peak_bytes for name, worker in workers.items() if (usage := worker.usage())}
    rows = {name: _summary(each) for name, each in answers.items()}
    show(rows)
    return {"configurations": rows, "cgroup_peak_bytes": peaks}


def _summary(answers: list[Answer]) -> Result:
    """Medians over repetitions, and what all of them did together."""
    stats, speeds = [answer["stats"] for answer in answers], [1 / answer["s_per_token"] for answer in answers]
    uses = sum((Counter(each["precision_uses"]) for each in stats), Counter())
    read = sum(each["bytes_from_disk"] for each in stats)
    return {
        "tokens_per_s": median(speeds),
        "read_bytes_per_token": read / sum(len(answer["seconds"]) for answer in answers),
        "hit_rate": median(each["hit_rate"] for each in stats),
        "precision_shares": {precision: count / uses.total() for precision, count in uses.items()},
        "repetitions": speeds,
    }


if __name__ == "__main__":
    arguments = Arguments(__doc__, "checkpoint", tokens=32, warm_up=32, repetitions=3, threads=None)
    arguments.positional("configurations", "experts, or experts/fallback", nargs="*", default=DEFAULT)
    arguments.option("--trace", None, "route by this trace's first layers", type=Path)
    arguments.option("--memory", "2500M", "each one's memory cgroup", type=size)
    arguments.option("--cpu-mem", "2400M", "the budget inside it", type=size)
    raise SystemExit(arguments.run(benchmark))
