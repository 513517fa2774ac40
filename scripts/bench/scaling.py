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
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from offload.traces.router import TraceRouter
from scripts.bench.common import Arguments, medians, note, random_ids, ratio, show, timed, turns
from scripts.bench.engines import DTYPE, Engine, decode, load
from scripts.bench.families import FAMILIES, Family, tensors
from scripts.bench.make_checkpoint import write_checkpoint
from scripts.bench.routes import FEW, routes
from scripts.bench.serve import Answer
from scripts.bench.storage import drop_page_cache, shards, size_bytes
from scripts.bench.workers import Worker, engine_command

LARGE = 4
"""How many times as large the experts of one model are."""
PLANS = {None: ("eight", "all"), "few": ("missing",)}
"""By the places for experts."""


def shape(args: argparse.Namespace, experts: int, *, large: bool = False) -> Family:
    """The family that all models have the layers of, but for size and number of experts."""
    sizes = {name: getattr(args, name) for name in ("hidden", "top_k", "layers", "vocab")}
    heads: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 64, "token_ids": {}}
    intermediate = args.intermediate * (LARGE if large else 1)
    return replace(FAMILIES["qwen3-30b-a3b"], **sizes, **heads, intermediate=intermediate, experts=experts)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Write the models, measure, and compare each with the smallest."""
    middle = args.experts[len(args.experts) // 2]
    models = {str(experts): shape(args, experts) for experts in args.experts}
    models[f"{middle} large"] = shape(args, middle, large=True)
    with tempfile.TemporaryDirectory(prefix="offload-scaling-", dir=args.folder) as temporary:
        folders = {name: Path(temporary, name.replace(" ", "-")) for name in models}
        for name, family in models.items():
            note(f"{name}: {write_checkpoint(family, folders[name]) / 1e6:.0f} MB")
        started = _starts(args, folders)
        decoded = _decodes(args, {experts: folders[str(experts)] for experts in args.experts})
    for name, family in models.items():
        dense = sum(tensor.nbytes for tensor in tensors(family) if ".experts." not in tensor.name)
        started[name]["dense_bytes"] = dense
    show(started, "start")
    for plan, rows in decoded.items():
        show({row["experts"]: row for row in rows}, plan)
    warm_s = {name: row["warm_s"] for name, row in started.items()}
    return {
        "decode": decoded,
        "start": started,
        "smallest_ratio": min(row["ratio"] for plan in ("eight", "missing") for row in decoded[plan]),
        "large_to_small_start_s": warm_s[f"{middle} large"] / warm_s[str(middle)],
        "most_to_fewest_start_s": warm_s[str(max(args.experts))] / warm_s[str(FEW)],
    }


def _decodes(args: argparse.Namespace, folders: Mapping[int, Path]) -> dict[str, list[dict[str, Any]]]:
    """By plan, a row a model: seconds a token, and the tokens/s as a share of the first model's."""
    result: dict[str, list[dict[str, Any]]] = {}
    for places, plans in PLANS.items():
        with ExitStack() as stack:
            engines = {}
            for experts, folder in folders.items():
                engines[experts] = load("offload", folder, **_options(args, folder if places else None))
                stack.callback(engines[experts].close)
            for plan in plans:
                note(f"decoding: {plan}")
                result[plan] = _in_turn(args, partial(_window, args, plan, engines))
    note("decoding: products")
    up, down = (2 * args.intermediate, args.hidden), (args.hidden, args.intermediate)
    one = [torch.empty(size, dtype=DTYPE).normal_(std=0.02) for size in (up, down)]
    weights = {n: [[[side.clone() for side in one] for _ in range(n)] for _ in range(args.layers)] for n in folders}
    result["products"] = _in_turn(args, lambda experts: (_products(args, experts, weights[experts]), 1.0))
    return result


def _in_turn(args: argparse.Namespace, window: Callable[[int], tuple[float, float]]) -> list[dict[str, Any]]:
    """A row a model of what `window` measures of it: (seconds a token, hit rate)."""
    samples: dict[int, list[tuple[float, float]]] = {experts: [] for experts in args.experts}
    for _, experts in turns(args.experts, args.repetitions + 1):
        samples[experts].append(window(experts))
    seconds, rates = ({n: [each[i] for each in own[1:]] for n, own in samples.items()} for i in range(2))
    return [
        {"experts": n, "s_per_token": median(own), "ratio": ratio(seconds[FEW], own), "hit_rate": median(rates[n])}
        for n, own in seconds.items()
    ]


def _window(args: argparse.Namespace, plan: str, engines: Mapping[int, Engine], experts: int) -> tuple[float, float]:
    """(median seconds a token, hit rate) of one window."""
    warm_up = 2 * (max(args.experts) // args.top_k if plan == "all" else FEW)
    tokens = args.tokens + warm_up
    with TraceRouter(engines[experts].model, routes(plan, experts, args.layers, args.top_k, tokens)):
        answer = decode(engines[experts], random_ids(tokens, args.vocab, 0), warm_up=warm_up)
    return median(answer["seconds"]), answer["stats"]["hit_rate"]


def _products(args: argparse.Namespace, experts: int, weights: list[list[list[torch.Tensor]]]) -> float:
    """Median seconds that the experts' products of a token take, in the order of the plan that uses all of them."""
    x = torch.ones(1, args.hidden, dtype=DTYPE)

    def token(chosen: list[list[int]]) -> None:
        for layer, ids in zip(weights, chosen, strict=True):
            for up, down in (layer[expert] for expert in ids):
                torch.mm(torch.mm(x, up.t())[:, : args.intermediate], down.t())

    plan = routes("all", experts, args.layers, args.top_k, args.tokens).experts.tolist()
    return median(timed(partial(token, chosen))() for chosen in plan)


def _options(args: argparse.Namespace, few: Path | None) -> dict[str, Any]:
    """How a model is loaded; the one in `few` with places for a token's experts alone."""
    options: dict[str, Any] = {"threads": 1, "context": 512, "device": "cpu", "predictor": "none"}
    if few is not None:
        expert = 6 * args.hidden * args.intermediate * (LARGE if few.name.endswith("large") else 1)
        options["expert_cache"] = args.layers * args.top_k * expert
    return options


def _starts(args: argparse.Namespace, folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """By model, the seconds it takes to load, cold and warm, what is read for it, and what is resident afterwards."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for _, name in turns(folders, args.starts):
        files, answers = shards(folders[name]), list[Answer]()
        drop_page_cache(files)
        for _ in range(2):
            command = engine_command("offload", folders[name], **_options(args, folders[name]))
            with Worker(name, command) as worker:
                answers.append(worker.ask())
        cold, warm = answers
        row = {"cold_s": cold["load_s"], "warm_s": warm["load_s"], "read_bytes": cold["read_bytes"]}
        samples[name].append(row | {"rss_bytes": warm["rss_bytes"], "checkpoint_bytes": size_bytes(folders[name])})
    return {name: medians(each) for name, each in samples.items()}


def _experts(text: str) -> list[int]:
    """The --experts argument, ascending."""
    counts = sorted({int(part) for part in text.split(",") if part.isdecimal()} | {FEW})
    if any(count < FEW or count % FEW for count in counts):
        raise argparse.ArgumentTypeError(f'"{text}": give multiples of {FEW} with commas between them')
    return counts


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, tokens=60, repetitions=7)
    arguments.option("--folder", None, "where models are written, if not in /tmp", type=Path)
    arguments.option("--experts", "8,16,32,64,128", f"a layer, multiples of {FEW}", type=_experts)
    arguments.option("--layers", 6, "of each model")
    arguments.option("--hidden", 512, "width of hidden states")
    arguments.option("--intermediate", 256, "width inside an expert")
    arguments.option("--top-k", 4, "experts a token goes to")
    arguments.option("--vocab", 4096, "tokens it knows")
    arguments.option("--starts", 5, "of each model")
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
