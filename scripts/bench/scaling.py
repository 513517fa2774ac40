"""Whether cost grows with what is used: random models that differ in experts a layer, and in nothing else.

    python scripts/bench/scaling.py --folder /data

Decoding takes as many experts a token at any number of them, routed by a fixed plan, with everything in memory or with
half of what is used missing, always. All models are loaded at once and take turns. Where all is in memory, one plan
uses eight experts of each layer, which lie in the processor's cache at any number, the other all of them in turn; the
same products by themselves, without a model, say what that alone costs.
Starting is measured with few places for experts, by processes of their own that take turns, with the files in the page
cache and not; one model more has experts four times as large. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from scripts.bench.common import (
    Answer,
    BenchmarkError,
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
from scripts.bench.engines import DTYPE, Engine, load_offload, steps
from scripts.bench.families import FAMILIES, Family
from scripts.bench.make_checkpoint import write_checkpoint
from scripts.bench.routes import FEW, routes

LARGE = 4
"""How many times as large the experts of one model are."""
PLANS = ("eight", "all", "missing")
CONTEXT = 512


def shape(args: argparse.Namespace, experts: int, *, large: bool = False) -> Family:
    """The family that all models have the layers of, but for size and number of experts."""
    return replace(
        FAMILIES["qwen3-30b-a3b"],
        hidden=args.hidden,
        heads=8,
        kv_heads=2,
        head_dim=64,
        intermediate=args.intermediate * (LARGE if large else 1),
        experts=experts,
        top_k=args.top_k,
        layers=args.layers,
        vocab=args.vocab,
        token_ids={},
    )


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Write the models, measure, and compare each with the smallest."""
    middle = args.experts[len(args.experts) // 2]
    with tempfile.TemporaryDirectory(prefix="offload-scaling-", dir=args.folder) as temporary:
        folders = {}
        for experts, large in [*((experts, False) for experts in args.experts), (middle, True)]:
            name = f"{experts} large" if large else str(experts)
            folders[name] = Path(temporary, name.replace(" ", "-"))
            note(f"{name}: {write_checkpoint(shape(args, experts, large=large), folders[name]) / 1e6:.0f} MB")
        started = starts(args, folders)
        decoded = decodes(args, {experts: folders[str(experts)] for experts in args.experts})
    for name, row in started.items():
        note(
            f"{name:>8} experts: {row['cold_s']:.2f} s cold, {row['warm_s']:.2f} s warm, read "
            f"{row['read_bytes'] / 1e6:.1f} MB of {row['checkpoint_bytes'] / 1e6:.0f}, "
            f"resident {row['rss_bytes'] / 1e6:.0f} MB"
        )
    smallest = min(row["ratio"] for plan in ("eight", "missing") for row in decoded[plan])
    return {
        "benchmark": "scaling",
        "layers": args.layers,
        "top_k": args.top_k,
        "tokens": args.tokens,
        "repetitions": args.repetitions,
        "decode": decoded,
        "start": started,
        "smallest_ratio": smallest,
        "large_to_small_start_s": started[f"{middle} large"]["warm_s"] / started[str(middle)]["warm_s"],
        "most_to_fewest_start_s": started[str(max(args.experts))]["warm_s"] / started[str(FEW)]["warm_s"],
    }


def decodes(args: argparse.Namespace, folders: Mapping[int, Path]) -> dict[str, list[dict[str, Any]]]:
    """By plan, a row a model: seconds a token, and the tokens/s as a share of the first model's."""
    result: dict[str, list[dict[str, Any]]] = {}
    for caches, plans in ((None, PLANS[:2]), (args.layers * args.top_k, PLANS[2:])):
        with ExitStack() as stack:
            engines = {experts: load(args, folder, caches) for experts, folder in folders.items()}
            for engine in engines.values():
                stack.callback(engine.close)
            for plan in plans:
                note(f"decoding: {plan}")
                window = partial(_decode, args, plan, engines)
                result[plan] = _in_turn(args, window)
    note("decoding: products")
    weights = {experts: _weights(args, experts) for experts in folders}
    result["products"] = _in_turn(args, lambda experts: (_products(args, experts, weights[experts]), 1.0))
    for plan, rows in result.items():
        each = (f"{row['experts']}: {row['ratio']:.3f}, {row['s_per_token']:.4f} s" for row in rows)
        note(f"{plan:>8}, of {FEW} experts' tokens/s: {'; '.join(each)}")
    return result


def _in_turn(args: argparse.Namespace, window: Callable[[int], tuple[float, float]]) -> list[dict[str, Any]]:
    """A row a model of what `window` measures of it: (seconds a token, hit rate)."""
    times: dict[int, list[float]] = {experts: [] for experts in args.experts}
    rates: dict[int, list[float]] = {experts: [] for experts in args.experts}
    for repetition in range(-1, args.repetitions):  # one to warm up
        for experts in args.experts[:: 1 if repetition % 2 else -1]:
            seconds, hit_rate = window(experts)
            if repetition >= 0:
                times[experts].append(seconds)
                rates[experts].append(hit_rate)
    first = times[FEW]
    return [
        {
            "experts": experts,
            "s_per_token": median(times[experts]),
            "ratio": median(a / b for a, b in zip(first, times[experts], strict=True)),
            "hit_rate": median(rates[experts]),
        }
        for experts in args.experts
    ]


def _weights(args: argparse.Namespace, experts: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Of each layer, the matrices of as many experts."""
    up, down = (2 * args.intermediate, args.hidden), (args.hidden, args.intermediate)
    sides = [torch.empty(up, dtype=DTYPE).normal_(std=0.02), torch.empty(down, dtype=DTYPE).normal_(std=0.02)]
    return [[(sides[0].clone(), sides[1].clone()) for _ in range(experts)] for _ in range(args.layers)]


def _products(
    args: argparse.Namespace, experts: int, weights: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]
) -> float:
    """Median seconds that the experts' products of a token take, in the order of the plan that uses all of them."""
    x, seconds = torch.ones(1, args.hidden, dtype=DTYPE), []
    for token in routes("all", experts, args.layers, args.top_k, args.tokens).experts.tolist():
        began = time.perf_counter()
        for layer, chosen in zip(weights, token, strict=True):
            for expert in chosen:
                up, down = layer[expert]
                torch.mm(torch.mm(x, up.t())[:, : args.intermediate], down.t())
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def _decode(args: argparse.Namespace, plan: str, engines: Mapping[int, Engine], experts: int) -> tuple[float, float]:
    """(median seconds a token, hit rate) of one window."""
    engine = engines[experts]
    from offload.traces.router import TraceRouter

    warm_up = 2 * (max(args.experts) // args.top_k if plan == "all" else FEW)
    tokens = args.tokens + warm_up
    with TraceRouter(engine.model, routes(plan, experts, args.layers, args.top_k, tokens)):
        seconds: list[float] = []
        for number, (taken, _) in enumerate(steps(engine, random_ids(tokens, args.vocab, args.seed))):
            if number == warm_up - 1:
                engine.reset()
            elif number >= warm_up:
                seconds.append(taken)
    return median(seconds), engine.stats()["hit_rate"]


def load(args: argparse.Namespace, folder: Path, slots: int | None) -> Engine:
    """A model with so many places for experts, None: all of them."""
    expert = 6 * args.hidden * args.intermediate * (LARGE if folder.name.endswith("large") else 1)
    return load_offload(
        folder, 1, None, CONTEXT, expert_cache=None if slots is None else slots * expert, predictor="none"
    )


def starts(args: argparse.Namespace, folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """By model, the seconds it takes to load, cold and warm, what is read for it, and what is resident afterwards."""
    samples: dict[str, list[tuple[Answer, Answer]]] = {name: [] for name in folders}
    for repetition in range(args.starts):
        note(f"starting: {repetition + 1} of {args.starts}")
        for name, folder in list(folders.items())[:: 1 if repetition % 2 == 0 else -1]:
            drop_page_cache(shards(folder))
            answers = []
            for _ in range(2):
                command = worker_command(__file__, args.argv, "--worker", folder)
                with Worker(name, command) as worker:
                    answers.append(worker.ask())
            samples[name].append((answers[0], answers[1]))
    return {
        name: {
            "cold_s": median(cold["load_s"] for cold, _ in each),
            "warm_s": median(warm["load_s"] for _, warm in each),
            "headers_s": median(warm["headers_s"] for _, warm in each),
            "read_bytes": median(cold["read_bytes"] for cold, _ in each),
            "rss_bytes": median(warm["rss_bytes"] for _, warm in each),
            "dense_bytes": each[0][0]["dense_bytes"],
            "checkpoint_bytes": sum(path.stat().st_size for path in shards(folders[name])),
        }
        for name, each in samples.items()
    }


def start(args: argparse.Namespace) -> Answer:
    """One start in this process."""
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401  what is imported is not timed

    from offload.checkpoint import hub
    from offload.checkpoint.mapping import read_checkpoint
    from offload.system import memory

    source = hub.describe(str(args.worker))
    began = time.perf_counter()
    checkpoint = read_checkpoint(source.name, source.folder, source.index, "auto")
    headers_s = time.perf_counter() - began
    dense_bytes = sum(info.nbytes for info in checkpoint.experts.dense.values())
    del checkpoint
    before = _bytes_read()
    began = time.perf_counter()
    engine = load(args, args.worker, args.layers * args.top_k)
    answer = {
        "load_s": time.perf_counter() - began,
        "headers_s": headers_s,
        "read_bytes": _bytes_read() - before,
        "rss_bytes": memory.resident_bytes(),
        "dense_bytes": dense_bytes,
    }
    engine.close()
    return answer


def _bytes_read() -> int:
    """What this process has asked the kernel to read, from the page cache or not."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    raise BenchmarkError("/proc/self/io does not say what was read: this benchmark needs Linux")


def _experts(text: str) -> list[int]:
    """The --experts argument, ascending."""
    counts = sorted({int(part) for part in text.split(",") if part.isdecimal()} | {FEW})
    if any(count < FEW or count % FEW for count in counts):
        raise argparse.ArgumentTypeError(f'"{text}": give multiples of {FEW} with commas between them')
    return counts


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=None, help="where models are written (default: /tmp)")
    parser.add_argument(
        "--experts", type=_experts, default="8,16,32,64,128", help="a layer, multiples of 8 (default 8,16,32,64,128)"
    )
    parser.add_argument("--layers", type=int, default=6, help="default 6")
    parser.add_argument("--hidden", type=int, default=512, help="default 512")
    parser.add_argument("--intermediate", type=int, default=256, help="of one expert (default 256)")
    parser.add_argument("--top-k", type=int, default=4, help="experts a token goes to (default 4)")
    parser.add_argument("--vocab", type=int, default=4096, help="default 4096")
    parser.add_argument("--tokens", type=int, default=60, help="measured in each window (default 60)")
    parser.add_argument("--repetitions", type=int, default=7, help="windows of each model (default 7)")
    parser.add_argument("--starts", type=int, default=5, help="of each model (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens (default 0)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.worker:

        def answer(request: Request) -> Answer:
            return start(args)

        return serve(lambda: answer)
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
