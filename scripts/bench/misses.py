"""Decoding where misses dominate: what the engine reads a second, beside what the disk gives, and what packing costs.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 4 --out /data/qwen3-4l
    python scripts/bench/misses.py /data/qwen3-4l --stores /data/qwen3-4l-experts

The same model twice, with its experts in records that lie as the CPU computes with them, and in plain ones, which a
reader packs at every miss. Both are loaded at once, have every record read beforehand, whose checksum is compared then,
are fed the same random tokens and take turns. The engine's rate is bytes over the time in which any reader is busy. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from offload.formats.cpu.native import library
from offload.options import PlanOptions
from offload.plan.conversion import convert_model
from scripts.bench.common import Arguments, medians, note, random_ids, ratio, show, turns, vocabulary, windows
from scripts.bench.engines import Engine, decode, load, prefill
from scripts.bench.storage import beside_disk

DEVICES = {"plain": "cuda", "ready": "cpu"}
"""What records are made for."""
PROMPTS, PROMPT = 12, 256  # which between them visit every expert


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Convert, load, let them take turns, and compare."""
    warm_up, parts = windows(args)
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in DEVICES}
    engines: dict[str, Engine] = {}
    files: list[Path] = []
    with ExitStack() as stack:
        for kind, device in DEVICES.items():
            note(f"converting and loading: {kind}")
            wanted = PlanOptions(experts=args.experts, expert_store=args.stores / kind, device=device)
            store = convert_model(args.checkpoint, wanted).folder
            files += store.glob("*.experts")
            engines[kind] = load(
                "offload",
                args.checkpoint,
                threads=args.threads,
                experts=args.experts,
                expert_store=store,
                predictor="none",
                expert_cache=args.expert_cache,
                context=max(PROMPT, args.warm_up, args.tokens),
                device="cpu",
            )
            stack.callback(engines[kind].close)
            for seed in range(PROMPTS):
                prefill(engines[kind], random_ids(PROMPT, vocabulary(args.checkpoint), seed))
            decode(engines[kind], warm_up)
        record = engines["ready"].model.plan.work.record_bytes
        for repetition, kind in turns(DEVICES, args.repetitions):
            action = partial(_window, engines[kind], parts[repetition])
            row, speed = beside_disk(files, record, args.disk_bytes, repetition, action)
            rows[kind].append(row | {"disk_bytes_per_s": speed, "share_of_disk": row["engine_bytes_per_s"] / speed})
    found = {kind: medians(each) for kind, each in rows.items()}
    show(found)
    speed_up = ratio(*([row["s_per_token"] for row in rows[kind]] for kind in ("plain", "ready")))
    return {"native": library() is not None, **found, "ready_speed_up": speed_up}


def _window(engine: Engine, ids: list[int]) -> dict[str, float]:
    """What one engine does with `ids`."""
    traffic = engine.model.parts.runtime.engine.traffic
    busy_s = traffic.totals()[1]
    answer = decode(engine, ids)
    busy_s, stats = traffic.totals()[1] - busy_s, answer["stats"]
    return {
        "s_per_token": mean(answer["seconds"]),
        "stall_s_per_token": stats["stall_s"] / len(ids),
        "hit_rate": stats["hit_rate"],
        "read_bytes_per_token": stats["bytes_from_disk"] / len(ids),
        "engine_bytes_per_s": stats["bytes_from_disk"] / busy_s,
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, "checkpoint", tokens=24, warm_up=40, repetitions=7, threads=None, disk_bytes=1 << 28)
    arguments.option("--stores", None, "where converted experts are kept, between runs too", type=Path, required=True)
    arguments.option("--experts", "nf4", "one precision that is packed: nf4 or int4")
    arguments.option("--expert-cache", "200M", "of each")
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
