"""Prefetching live: stall and tokens/s by predictor and depth, against the same model with every expert in place.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 6 --out /data/qwen3-6l
    python scripts/bench/prefetch.py /data/qwen3-6l                    # an emulated accelerator, experts in RAM
    python scripts/bench/prefetch.py /data/qwen3-6l --device cpu       # the CPU, experts on disk

Fixed random tokens, one a step, each run from an empty KV cache; the model's own gates route. The first run records the
trace that the oracle knows, and what the gates said ahead. On an accelerator the link's speed is then set so that
fetching what a layer misses takes as long as computing the layer, and at the end to a quarter of it: a saturated link.
Configurations take turns. The bound, before and after, is a process that has every expert where it is computed. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from offload.system.sizes import parse_bytes
from scripts.bench.common import (
    Answer,
    Request,
    Worker,
    drop_page_cache,
    note,
    random_ids,
    run,
    serve,
    shards,
    worker_command,
)

CONFIGURATIONS = (
    ("none", 0),
    ("frequency", 1),
    ("cross-layer-gate", 1),
    ("cross-layer-gate", 2),
    ("cross-layer-gate", 3),
    ("oracle", 1),
    ("oracle", 3),
)
SATURATED = (("none", 0), ("cross-layer-gate", 2), ("oracle", 1))


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Record, set the link, let the configurations take turns, and compare."""
    files = shards(args.checkpoint)
    vocab = json.loads((args.checkpoint / "config.json").read_text())["vocab_size"]
    ids = random_ids(args.warm_up + args.tokens, vocab, args.seed)

    def worker(name: str) -> Worker:
        note(f"loading {name}")
        return Worker(name, worker_command(__file__, args.argv, "--worker", name))

    def bound() -> list[float]:
        with worker("resident") as resident:  # alone: both together may not fit this machine
            return [resident.ask(ids=ids)["s_per_token"] for _ in range(args.repetitions + 1)][1:]

    bounds = bound()
    result: dict[str, Any] = {"benchmark": "prefetch", "device": args.device}
    with tempfile.TemporaryDirectory() as folder, worker("offload") as offloaded:
        trace = str(Path(folder) / "trace.safetensors")

        def measure(predictor: str, depth: int) -> Answer:
            drop_page_cache(files)
            return offloaded.ask(ids=ids, predictor=predictor, depth=depth, profile=trace)

        recorded = offloaded.ask(ids=ids, record=trace)
        result["gate_recall"] = recorded["recall"]
        note(f"recall of the gates: {recorded['recall']}")
        if args.device == "emulated":
            misses = measure("none", 0)["misses_per_token"]
            result["link_bytes_per_s"] = misses * recorded["slot_bytes"] / median(bounds)
            note(f"link: {offloaded.ask(link=result['link_bytes_per_s'])['link'] / 1e9:.2f} GB/s")
        result["rows"] = compare(measure, CONFIGURATIONS, args.repetitions)
        if args.device == "emulated":
            offloaded.ask(link=result["link_bytes_per_s"] / 4)
            result["saturated"] = compare(measure, SATURATED, args.repetitions)
        if args.keep_trace:
            shutil.copy(trace, args.keep_trace)
    bounds += bound()
    result["resident_s_per_token"] = median(bounds)
    for row in result["rows"]:
        row["share_of_bound"] = median(bounds) / row["s_per_token"]
    return result


def compare(
    measure: Callable[[str, int], Answer], configurations: Sequence[tuple[str, int]], repetitions: int
) -> list[dict[str, Any]]:
    """Medians over repetitions, in which configurations take turns."""
    found: dict[tuple[str, int], list[Answer]] = {configuration: [] for configuration in configurations}
    for repetition in range(repetitions):
        for predictor, depth in configurations if repetition % 2 == 0 else configurations[::-1]:
            answer = measure(predictor, depth)
            found[predictor, depth].append(answer)
            note(
                f"{repetition + 1}: {predictor} {depth}: {1 / answer['s_per_token']:.2f} tokens/s, "
                f"stall {answer['stall_s_per_token'] * 1e3:.1f} ms of {answer['s_per_token'] * 1e3:.1f}"
            )
    none = [answer["s_per_token"] for answer in found["none", 0]]
    rows = []
    for (predictor, depth), answers in found.items():
        row: dict[str, Any] = {"predictor": predictor, "depth": depth}
        row |= {key: median(answer[key] for answer in answers) for key in answers[0] if key != "prefetch"}
        row["speedup"] = median(a / answer["s_per_token"] for a, answer in zip(none, answers, strict=True))
        row["tokens_per_s"] = 1 / row["s_per_token"]
        row["prefetch"] = [answer["prefetch"] for answer in answers]
        rows.append(row)
    return rows


def engine(args: argparse.Namespace) -> Callable[[Request], Answer]:
    """Load the worker's model and answer: {"ids", "predictor", "depth", "profile"}, {"record"}, {"link"}."""
    from offload.model import OffloadedModel
    from scripts.bench import engines

    count = args.warm_up + args.tokens
    sizes: dict[str, Any] = {"device": args.device, "context": count + 16, "expert_cache": args.expert_cache}
    if args.worker == "resident":
        del sizes["expert_cache"]
    if args.device == "emulated":
        whole, more = sum(path.stat().st_size for path in shards(args.checkpoint)), 3 * 10**9
        on_device = whole if args.worker == "resident" else parse_bytes(args.expert_cache)
        in_memory = 0 if args.worker == "resident" else whole
        sizes |= {"gpu_mem": on_device + more, "cpu_mem": in_memory + 2 * more}
    model = OffloadedModel.from_pretrained(args.checkpoint, **sizes)
    loaded = engines.Engine(model.forward, model.config)

    def measured(request: Request) -> Answer:
        ids = request["ids"]
        model.use_predictor(
            request.get("predictor", "none"), depth=request.get("depth") or None, profile=_profile(request)
        )
        seconds = []
        for index, (step, _) in enumerate(engines.steps(loaded, ids), 1):
            if index == args.warm_up:
                model.reset_stats()
            if index > args.warm_up:
                seconds.append(step)
        stats = model.stats.as_dict()
        tokens = len(seconds) or 1
        names = ("hits", "late_hits", "misses", "prefetches", "useful_prefetches", "wasted_prefetches")
        return {
            "s_per_token": mean(seconds) if seconds else 0.0,
            "stall_s_per_token": stats["stall_s"] / tokens,
            **{f"{name}_per_token": stats[name] / tokens for name in (*names, "cancelled_prefetches")},
            "prefetch": stats["prefetch"],
        }

    def record(request: Request) -> Answer:
        from cache.traces.trace import Trace
        from predictors.base import make_predictor
        from predictors.evaluate import evaluate

        path = request["record"]
        with model.record_trace(path, predicted=3):
            list(engines.steps(loaded, request["ids"]))
        trace = Trace.open(path)
        gate = make_predictor("cross-layer-gate", trace.num_layers, trace.num_experts)
        return {"recall": evaluate(gate, trace).as_dict()["recall"], "slot_bytes": model.plan.slot_bytes}

    def handle(request: Request) -> Answer:
        if "link" in request:
            device: Any = model.parts.device
            device.link_bytes_per_s = request["link"]
            return {"link": device.link_bytes_per_s}
        return record(request) if "record" in request else measured(request)

    return handle


def _profile(request: Request) -> str | None:
    return request["profile"] if request.get("predictor") == "oracle" else None


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder that scripts/bench/make_checkpoint.py wrote")
    parser.add_argument("--device", default="emulated", help="emulated (default), cpu or cuda")
    parser.add_argument("--expert-cache", default="1800M", help="of the offloaded model (default 1800M)")
    parser.add_argument("--tokens", type=int, default=48, help="measured tokens a run (default 48)")
    parser.add_argument("--warm-up", type=int, default=32, help="tokens before them (default 32)")
    parser.add_argument("--repetitions", type=int, default=3, help="default 3")
    parser.add_argument("--keep-trace", type=Path, help="where to copy the recorded trace")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens (default 0)")
    parser.add_argument("--worker", choices=("offload", "resident"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.worker:
        return serve(lambda: engine(args))
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
