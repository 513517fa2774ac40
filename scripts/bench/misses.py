"""Decoding where misses dominate: what the engine reads a second, beside what the disk gives, and what packing costs.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 4 --out /data/qwen3-4l
    python scripts/bench/misses.py /data/qwen3-4l --stores /data/qwen3-4l-experts

The same model twice, with its experts in records that lie as the CPU computes with them, and in plain ones, which a
reader packs at every miss. Every record is read beforehand, because its checksum is compared then.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from offload.formats.cpu.native import library
from offload.options import PlanOptions
from offload.plan.conversion import convert_model
from scripts.bench.common import Args, Arguments, Result, in_turn, note, ratio_of, size, summary, warm_prompts, windows
from scripts.bench.engines import Engine, decode, load, prefill
from scripts.bench.storage import beside_disk

DEVICES = {"plain": "cuda", "ready": "cpu"}
"""What records are made for."""
PROMPT = 256  # tokens


def benchmark(args: Args) -> Result:
    """Convert, load, let them take turns, and compare."""
    warm_up, parts = windows(args)
    engines: dict[str, Engine] = {}
    files: list[Path] = []
    with ExitStack() as stack:
        for kind, device in DEVICES.items():
            note(f"converting and loading: {kind}")
            wanted = PlanOptions(experts=args.experts, expert_store=args.stores / kind, device=device)
            store = convert_model(args.checkpoint, wanted).folder
            files += store.glob("*.experts")
            options = {"experts": args.experts, "expert_store": store, "expert_cache": args.expert_cache}
            options |= {"device": "cpu", "predictor": "none", "context": max(PROMPT, args.warm_up, args.tokens)}
            engines[kind] = load("offload", args.checkpoint, threads=args.threads, **options)
            stack.callback(engines[kind].close)
            for prompt in warm_prompts(args.checkpoint, PROMPT):
                prefill(engines[kind], prompt)
            decode(engines[kind], warm_up)
        record = engines["ready"].model.plan.work.record_bytes

        def window(kind: str, repetition: int) -> Result:
            decoded = partial(_decoded, engines[kind], parts[repetition])
            row, speed = beside_disk(files, record, args.disk_bytes, repetition, decoded)
            return row | {"disk_bytes_per_s": speed, "share_of_disk": row["engine_bytes_per_s"] / speed}

        rows = in_turn(DEVICES, args.repetitions, window)
    found = summary(rows)
    speed_up = ratio_of("s_per_token", rows["plain"], rows["ready"])
    return {"native": library() is not None, **found, "ready_speed_up": speed_up}


def _decoded(engine: Engine, ids: list[int]) -> Result:
    """What one engine does with `ids`."""
    traffic = engine.model.parts.runtime.engine.traffic
    busy_s = traffic.totals()[1]
    answer = decode(engine, ids)
    busy_s, stats = traffic.totals()[1] - busy_s, answer["stats"]
    return {
        "s_per_token": answer["s_per_token"],
        "stall_s_per_token": stats["stall_s"] / len(ids),
        "hit_rate": stats["hit_rate"],
        "read_bytes_per_token": stats["bytes_from_disk"] / len(ids),
        "engine_bytes_per_s": stats["bytes_from_disk"] / busy_s,
    }


if __name__ == "__main__":
    arguments = Arguments(__doc__, "checkpoint", tokens=24, warm_up=40, repetitions=7, threads=None, disk_bytes=1 << 28)
    arguments.option("--stores", None, "where converted experts are kept, between runs too", type=Path, required=True)
    arguments.option("--experts", "nf4", "one precision that is packed: nf4 or int4")
    arguments.option("--expert-cache", "200M", "of each", type=size)
    raise SystemExit(arguments.run(benchmark))
