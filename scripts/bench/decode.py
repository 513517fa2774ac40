"""Decode from disk and RAM: this project against accelerate's disk offload, each alone in a memory cgroup.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 6 --out /data/qwen3-6l
    python scripts/bench/decode.py /data/qwen3-6l

A table on standard error, and as the last line JSON.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from scripts.bench.common import Args, Arguments, Result, in_turn, medians, show, size, windows
from scripts.bench.serve import Answer, same_choices
from scripts.bench.storage import beside_disk, drop_page_cache, need_space, shards, size_bytes
from scripts.bench.workers import Worker, engine_command


def benchmark(args: Args) -> Result:
    """Load every engine, let them take turns, and compare."""
    checkpoint, files = args.checkpoint, shards(args.checkpoint)
    need_space(checkpoint.parent, size_bytes(checkpoint), "accelerate rewrites the experts there")
    warm_up, parts = windows(args)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=checkpoint.parent, prefix=".accelerate-")))
        options = {
            "offload": {"cpu_mem": args.cpu_mem, "context": max(args.warm_up, args.tokens)},
            "accelerate": {"folder": folder, "cpu_layers": args.accelerate_cpu_layers},
            "dense": {},
        }
        workers = {}
        for name, own in options.items():
            command = engine_command(name, checkpoint, threads=args.threads, **own)
            workers[name] = stack.enter_context(Worker(name, command, args.memory))
            workers[name].ask()  # loaded: what it has read so far is forgotten
            drop_page_cache(files + sorted(folder.glob("*")))
            workers[name].ask(ids=warm_up)
            drop_page_cache(files)
        record = workers["offload"].ask()["plan"]["slot_bytes"]

        def window(name: str, repetition: int) -> Answer:
            ask = partial(workers[name].ask, ids=parts[repetition])
            if name != "offload":
                return ask()
            answer, speed = beside_disk(files, record, args.disk_bytes, repetition, ask)
            return answer | {"disk_bytes_per_s": speed}

        answers = in_turn(workers, args.repetitions, window)
        peaks = {name: usage.peak_bytes for name, worker in workers.items() if (usage := worker.usage())}
    rows = [_figures(record, *each) for each in zip(*answers.values(), strict=True)]
    show({"median": medians(rows)} | dict(enumerate(rows, 1)))
    return {**medians(rows), "repetitions": rows, "cgroup_peak_bytes": peaks}


def _figures(record: int, ours: Answer, theirs: Answer, dense: Answer) -> dict[str, float]:
    """One repetition's; the limit is of the disk's speed beside it."""
    stats, tokens = ours["stats"], len(ours["seconds"])
    ours_s, theirs_s, dense_s = (answer["s_per_token"] for answer in (ours, theirs, dense))
    missed = (stats["late_hits"] + stats["misses"]) * record / tokens
    limit_s = missed / ours["disk_bytes_per_s"] + dense_s
    return {
        "offload_tokens_per_s": 1 / ours_s,
        "accelerate_tokens_per_s": 1 / theirs_s,
        "ratio_to_accelerate": theirs_s / ours_s,
        "limit_tokens_per_s": 1 / limit_s,
        "share_of_limit": limit_s / ours_s,
        "hit_rate": stats["hit_rate"],
        "missed_bytes_per_token": missed,
        "read_bytes_per_token": stats["bytes_from_disk"] / tokens,
        "disk_bytes_per_s": ours["disk_bytes_per_s"],
        "dense_s_per_token": dense_s,
        "same_choice_as_accelerate": mean(same_choices([ours], [theirs])),
    }


if __name__ == "__main__":
    arguments = Arguments(__doc__, "checkpoint", tokens=48, warm_up=24, repetitions=5, threads=None, disk_bytes=1 << 30)
    arguments.option("--memory", "4G", "each engine's memory cgroup", type=size)
    arguments.option("--cpu-mem", "3900M", "our budget inside it", type=size)
    arguments.option("--accelerate-cpu-layers", 0, "layers whose experts accelerate keeps in memory")
    raise SystemExit(arguments.run(benchmark))
