"""Decoding where misses dominate: what the engine reads a second, beside what the disk gives, and what packing costs.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 4 --out /data/qwen3-4l
    python scripts/bench/misses.py /data/qwen3-4l --stores /data/qwen3-4l-experts

The same model twice, with its experts in records that lie as the CPU computes with them, and in plain ones, which a
reader packs at every miss. Both are loaded at once, have every record checked beforehand, are fed the same random
tokens and take turns. The engine's rate is bytes over the time in which any reader is busy. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

from offload.formats.cpu.native import library
from scripts.bench.common import default_threads, disk_bandwidth, note, random_ids, run

DEVICES = {"plain": "cuda", "ready": "cpu"}
"""What records are made for."""


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Convert, load, let them take turns, and compare."""
    from offload.model import OffloadedModel
    from offload.options import PlanOptions
    from offload.plan.conversion import convert_model
    from scripts.bench.engines import Engine, decode, engine_of

    vocab = json.loads((args.checkpoint / "config.json").read_text())["vocab_size"]
    ids = random_ids(args.warm_up + args.tokens * args.repetitions, vocab, args.seed)
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in DEVICES}
    engines: dict[str, Engine] = {}
    with ExitStack() as stack:
        files: list[Path] = []
        for kind, device in DEVICES.items():
            note(f"converting and loading: {kind}")
            folder = convert_model(
                args.checkpoint, PlanOptions(experts=args.experts, expert_store=args.stores / kind, device=device)
            ).folder
            files += folder.glob("*.experts")
            model = stack.enter_context(
                OffloadedModel.from_pretrained(
                    args.checkpoint,
                    experts=args.experts,
                    expert_store=folder,
                    predictor="none",
                    expert_cache=args.expert_cache,
                    context=max(args.warm_up, args.tokens),
                    device="cpu",
                    threads=args.threads,
                )
            )
            _read_all(model)
            engines[kind] = engine_of(model)
            decode(engines[kind], ids[: args.warm_up])
        record = engines["ready"].model.plan.work.record_bytes
        for repetition in range(args.repetitions):
            start = args.warm_up + repetition * args.tokens
            for kind in list(DEVICES) if repetition % 2 else list(DEVICES)[::-1]:
                engine = engines[kind]
                before = disk_bandwidth(files, record, seed=2 * repetition, total_bytes=args.disk_bytes)
                engine.reset()
                busy_s = engine.model.parts.runtime.engine.traffic.totals()[1]
                seconds = decode(engine, ids[start : start + args.tokens])["seconds"]
                busy_s = engine.model.parts.runtime.engine.traffic.totals()[1] - busy_s
                after = disk_bandwidth(files, record, seed=2 * repetition + 1, total_bytes=args.disk_bytes)
                stats = engine.stats()
                rate = stats["bytes_from_disk"] / busy_s
                rows[kind].append(
                    {
                        "s_per_token": mean(seconds),
                        "stall_s_per_token": stats["stall_s"] / args.tokens,
                        "hit_rate": stats["hit_rate"],
                        "read_bytes_per_token": stats["bytes_from_disk"] / args.tokens,
                        "engine_bytes_per_s": rate,
                        "disk_bytes_per_s": mean((before, after)),
                        "share_of_disk": rate / mean((before, after)),
                    }
                )
                note(
                    f"repetition {repetition + 1}: {kind} {1000 * mean(seconds):.1f} ms a token, {rate / 1e9:.2f} GB/s"
                )
    ratios = [
        plain["s_per_token"] / ready["s_per_token"] for plain, ready in zip(rows["plain"], rows["ready"], strict=True)
    ]
    return {
        "benchmark": "misses",
        "checkpoint": args.checkpoint.name,
        "experts": args.experts,
        "native": library() is not None,
        "threads": args.threads,
        "tokens": args.tokens,
        "repetitions": args.repetitions,
        **{kind: {key: median(row[key] for row in each) for key in each[0]} for kind, each in rows.items()},
        "ready_speed_up": median(ratios),
    }


def _read_all(model: Any) -> None:
    """Have every record compared with its checksum, which the first read of each does."""
    import torch

    from cache.types import ExpertKey

    (source,) = model.parts.store.slices
    slot, reader = torch.empty(source.slot_bytes + 4096, dtype=torch.uint8), source.open()
    slot = slot[-slot.data_ptr() % 4096 :][: source.slot_bytes]
    for layer in model.parts.experts.layers:
        for expert in range(layer.num_experts):
            reader.read(ExpertKey(layer.index, expert), slot)
    reader.close()


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder that scripts/bench/make_checkpoint.py wrote")
    parser.add_argument("--stores", type=Path, required=True, help="where converted experts are kept, between runs too")
    parser.add_argument("--experts", default="nf4", help="one precision that is packed: nf4 or int4 (default nf4)")
    parser.add_argument("--expert-cache", default="200M", help="default 200M")
    parser.add_argument("--tokens", type=int, default=24, help="measured in each window (default 24)")
    parser.add_argument("--warm-up", type=int, default=40, help="tokens before the first (default 40)")
    parser.add_argument("--repetitions", type=int, default=7, help="windows of each (default 7)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="that compute (default: all cores)")
    parser.add_argument("--disk-bytes", type=int, default=2**28, help="read to time the disk (default 2^28)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens (default 0)")
    args = parser.parse_args(argv)
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
