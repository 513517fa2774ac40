"""Decode from disk and RAM: this project against accelerate's disk offload, each alone in a memory cgroup.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 6 --out /data/qwen3-6l
    python scripts/bench/decode.py /data/qwen3-6l

Both engines are fed the same fixed random tokens, one a step. They take turns, repetition by repetition, and
the disk is measured before and after each of ours. The limit is what a perfect engine with our hit rate would
need for a token: missed bytes at the disk's speed, then the model without its experts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from cache.errors import DiskSpaceError
from offload.system.sizes import format_bytes, parse_bytes
from scripts.bench.common import Arguments, BenchmarkError, medians, note, show, turns, windows
from scripts.bench.serve import Answer
from scripts.bench.storage import beside_disk, drop_page_cache, shards, size_bytes
from scripts.bench.workers import Worker, engine_command


def expert_bytes(checkpoint: Path) -> int:
    """Bytes of one expert's three bfloat16 matrices. Raises BenchmarkError for a config that does not say."""
    config = json.loads((checkpoint / "config.json").read_text())
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size")
    if not inner or "hidden_size" not in config:
        raise BenchmarkError(f"{checkpoint}/config.json does not give the shape of an expert")
    return 3 * 2 * int(config["hidden_size"]) * int(inner)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Load every engine, let them take turns, and compare."""
    checkpoint, files = args.checkpoint, shards(args.checkpoint)
    size, free = size_bytes(checkpoint), shutil.disk_usage(checkpoint).free
    if free < size:
        raise DiskSpaceError(
            f"accelerate rewrites the experts: {checkpoint.parent} has {format_bytes(free)} free, "
            f"{format_bytes(size)} are needed"
        )
    warm_up, parts = windows(args)
    record = expert_bytes(checkpoint)
    answers: dict[str, list[Answer]] = {}
    speeds = []
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".accelerate-")
        folder = Path(stack.enter_context(temporary))
        options = {
            "offload": {"cpu_mem": parse_bytes(args.cpu_mem, "--cpu-mem"), "context": max(args.warm_up, args.tokens)},
            "accelerate": {"folder": folder, "cpu_layers": args.accelerate_cpu_layers},
            "dense": {},
        }
        workers = {}
        for name, own in options.items():
            command = engine_command(name, checkpoint, threads=args.threads, **own)
            workers[name] = stack.enter_context(Worker(name, command, parse_bytes(args.memory, "--memory")))
            workers[name].ask()  # loaded: what it has read so far is forgotten
            drop_page_cache(files + sorted(folder.glob("*")))
            workers[name].ask(ids=warm_up)
            drop_page_cache(files)
        for repetition, name in turns(workers, args.repetitions):
            action = partial(workers[name].ask, ids=parts[repetition])
            if name == "offload":
                answer, speed = beside_disk(files, record, args.disk_bytes, repetition, action)
                speeds.append(speed)
            else:
                answer = action()
            answers.setdefault(name, []).append(answer)
            note(f"repetition {repetition + 1}: {name} {1 / mean(answer['seconds']):.2f} tokens/s")
        peaks = {name: usage.peak_bytes for name, worker in workers.items() if (usage := worker.usage())}
    engines = (answers[name] for name in ("offload", "accelerate", "dense"))
    rows = [_figures(record, *each) for each in zip(*engines, speeds, strict=True)]
    show({"median": medians(rows)} | dict(enumerate(rows, 1)))
    return {**medians(rows), "repetitions": rows, "cgroup_peak_bytes": peaks}


def _figures(record: int, ours: Answer, theirs: Answer, dense: Answer, speed: float) -> dict[str, float]:
    """One repetition's; the limit is of the disk's speed beside it."""
    stats, tokens = ours["stats"], len(ours["seconds"])
    ours_s, theirs_s, dense_s = (mean(answer["seconds"]) for answer in (ours, theirs, dense))
    missed = (stats["late_hits"] + stats["misses"]) * record / tokens
    limit_s = missed / speed + dense_s
    return {
        "offload_tokens_per_s": 1 / ours_s,
        "accelerate_tokens_per_s": 1 / theirs_s,
        "ratio_to_accelerate": theirs_s / ours_s,
        "limit_tokens_per_s": 1 / limit_s,
        "share_of_limit": limit_s / ours_s,
        "hit_rate": stats["hit_rate"],
        "missed_bytes_per_token": missed,
        "read_bytes_per_token": stats["bytes_from_disk"] / tokens,
        "disk_bytes_per_s": speed,
        "dense_s_per_token": dense_s,
        "same_choice_as_accelerate": mean(a == b for a, b in zip(ours["chosen"], theirs["chosen"], strict=True)),
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, "checkpoint", tokens=48, warm_up=24, repetitions=5, threads=None, disk_bytes=1 << 30)
    arguments.option("--memory", "4G", "each engine's memory cgroup")
    arguments.option("--cpu-mem", "3900M", "our budget inside it")
    arguments.option("--accelerate-cpu-layers", 0, "layers whose experts accelerate keeps in memory")
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
