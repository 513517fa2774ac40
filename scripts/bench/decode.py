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
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

from cache.errors import DiskSpaceError
from offload.system.sizes import format_bytes, parse_bytes
from scripts.bench.common import (
    Answer,
    BenchmarkError,
    Request,
    Worker,
    default_threads,
    disk_bandwidth,
    drop_page_cache,
    note,
    random_ids,
    run,
    serve,
    shards,
    worker_command,
)

ENGINES = ("offload", "accelerate", "dense")


def expert_bytes(checkpoint: Path) -> int:
    """Bytes of one expert's three bfloat16 matrices. Raises BenchmarkError for a config that does not say."""
    config = json.loads((checkpoint / "config.json").read_text())
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size")
    if not inner or "hidden_size" not in config:
        raise BenchmarkError(f"{checkpoint}/config.json does not give the shape of an expert")
    return 3 * 2 * int(config["hidden_size"]) * int(inner)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Load every engine, let them take turns, and compare."""
    checkpoint = args.checkpoint
    files = shards(checkpoint)
    size = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(checkpoint).free
    if free < size:
        raise DiskSpaceError(
            f"accelerate rewrites the experts: {checkpoint.parent} has {format_bytes(free)} free, "
            f"{format_bytes(size)} are needed"
        )
    vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    ids = random_ids(args.warm_up + args.tokens * args.repetitions, vocab, args.seed)
    record = expert_bytes(checkpoint)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
    speeds: list[float] = []

    with ExitStack() as stack:
        rewritten = tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".accelerate-")
        folder = Path(stack.enter_context(rewritten))
        workers = {}
        for name in ENGINES:
            note(f"loading {name}")
            command = worker_command(__file__, args.argv, "--worker", name, "--offload-folder", folder)
            workers[name] = stack.enter_context(Worker(name, command, parse_bytes(args.memory, "--memory")))
            drop_page_cache(files + sorted(folder.glob("*")))
            workers[name].ask(ids=ids[: args.warm_up])
            drop_page_cache(files)

        for repetition in range(args.repetitions):
            start = args.warm_up + repetition * args.tokens
            window = ids[start : start + args.tokens]
            for name in ENGINES if repetition % 2 == 0 else reversed(ENGINES):
                before = (
                    disk_bandwidth(files, record, seed=2 * repetition, total_bytes=args.disk_bytes)
                    if name == "offload"
                    else 0.0
                )
                answer = workers[name].ask(ids=window)
                if name == "offload":
                    after = disk_bandwidth(files, record, seed=2 * repetition + 1, total_bytes=args.disk_bytes)
                    speeds.append(mean((before, after)))
                results[name].append(answer)
                note(f"repetition {repetition + 1}: {name} {1 / mean(answer['seconds']):.2f} tokens/s")
        peaks = {name: usage.peak_bytes for name, worker in workers.items() if (usage := worker.usage())}
    return summary(results, speeds, record, args) | {"cgroup_peak_bytes": peaks}


def summary(
    results: dict[str, list[dict[str, Any]]], speeds: list[float], record: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Medians over repetitions; the limit and our share of it are taken repetition by repetition."""
    rows = []
    for ours, theirs, dense, speed in zip(*(results[name] for name in ENGINES), speeds, strict=True):
        stats, tokens = ours["stats"], len(ours["seconds"])
        missed = (stats["late_hits"] + stats["misses"] + stats["bypasses"]) * record / tokens
        limit_s = missed / speed + mean(dense["seconds"])
        agree = sum(a == b for a, b in zip(ours["chosen"], theirs["chosen"], strict=True)) / tokens
        rows.append(
            {
                "offload_tokens_per_s": 1 / mean(ours["seconds"]),
                "accelerate_tokens_per_s": 1 / mean(theirs["seconds"]),
                "ratio_to_accelerate": mean(theirs["seconds"]) / mean(ours["seconds"]),
                "limit_tokens_per_s": 1 / limit_s,
                "share_of_limit": limit_s / mean(ours["seconds"]),
                "hit_rate": stats["hit_rate"],
                "missed_bytes_per_token": missed,
                "read_bytes_per_token": stats["bytes_from_disk"] / tokens,
                "disk_bytes_per_s": speed,
                "dense_s_per_token": mean(dense["seconds"]),
                "same_choice_as_accelerate": agree,
            }
        )
    return {
        "benchmark": "decode",
        "checkpoint": args.checkpoint.name,
        "memory_bytes": parse_bytes(args.memory),
        "cpu_mem_bytes": parse_bytes(args.cpu_mem),
        "threads": args.threads,
        "tokens": args.tokens,
        **{key: median(row[key] for row in rows) for key in rows[0]},
        "repetitions": rows,
    }


def engine(args: argparse.Namespace) -> Callable[[Request], Answer]:
    """Load the worker's engine."""
    from scripts.bench import engines

    if args.worker == "offload":
        context = max(args.warm_up, args.tokens)
        cpu_mem = parse_bytes(args.cpu_mem, "--cpu-mem")
        loaded = engines.load_offload(args.checkpoint, args.threads, cpu_mem, context)
    elif args.worker == "accelerate":
        loaded = engines.load_accelerate(args.checkpoint, args.threads, args.offload_folder, args.accelerate_cpu_layers)
    else:
        loaded = engines.load_dense_part(args.checkpoint, args.threads)
    return engines.handler(loaded)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder that scripts/bench/make_checkpoint.py wrote")
    parser.add_argument("--memory", default="4G", help="each engine's memory cgroup (default 4G)")
    parser.add_argument("--cpu-mem", default="3900M", help="our budget inside it (default 3900M)")
    parser.add_argument("--tokens", type=int, default=48, help="measured tokens a repetition (default 48)")
    parser.add_argument("--warm-up", type=int, default=24, help="tokens before the first (default 24)")
    parser.add_argument("--repetitions", type=int, default=5, help="default 5")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of each engine (default: all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens (default 0)")
    parser.add_argument(
        "--disk-bytes",
        type=int,
        default=1 << 30,
        help="read at each thread count to time the disk (default 2^30)",
    )
    parser.add_argument(
        "--accelerate-cpu-layers", type=int, default=0, help="layers whose experts accelerate keeps in memory"
    )
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--offload-folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.worker:
        return serve(lambda: engine(args))
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
