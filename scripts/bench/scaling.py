"""Whether cost grows with what is used: random models that differ in experts a layer, and in nothing else.

    python scripts/bench/scaling.py --folder /data

Decoding takes as many experts a token at any number of them, routed by a fixed plan, with everything in memory or with
half of what is used missing, always. Where all is in memory, one plan uses eight experts of each layer, which lie in
the processor's cache at any number, the other all of them in turn; the same products by themselves, without a model,
say what that alone costs. Starting is measured with few places for experts, by processes of their own, with the files
in the page cache and not; one model more has experts four times as large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from offload.traces.router import TraceRouter
from scripts.bench.common import Args, Arguments, Result, in_turn, medians, note, random_ids, ratio_of, show, timed
from scripts.bench.engines import DTYPE, Engine, decode, load
from scripts.bench.families import FAMILIES, Family, tensors
from scripts.bench.make_checkpoint import write_checkpoint
from scripts.bench.routes import FEW, routes
from scripts.bench.storage import drop_page_cache, shards, size_bytes
from scripts.bench.workers import Worker, engine_command

LARGE = 4
"""How many times as large the experts of one model are."""
PLANS = {None: ("eight", "all"), "few": ("missing",)}
"""By the places for experts."""


def benchmark(args: Args) -> Result:
    """Write the models, measure, and compare each with the smallest."""
    middle = args.experts[len(args.experts) // 2]
    models = {str(experts): shape(args, experts) for experts in args.experts}
    models[f"{middle} large"] = shape(args, middle, large=True)
    with TemporaryDirectory(prefix="offload-scaling-", dir=args.folder) as temporary:
        folders = {name: Path(temporary, name.replace(" ", "-")) for name in models}
        for name, family in models.items():
            note(f"{name}: {write_checkpoint(family, folders[name]) / 1e6:.0f} MB")
        rows = in_turn(folders, args.starts, lambda name, _: _start(args, folders[name]))
        decoded = _decodes(args, {experts: folders[str(experts)] for experts in args.experts})
    started = {name: medians(own) for name, own in rows.items()}
    for name, family in models.items():
        started[name]["dense_bytes"] = sum(each.nbytes for each in tensors(family) if ".experts." not in each.name)
    show(started, "start")
    for plan, lines in decoded.items():
        show({row["experts"]: row for row in lines}, plan)
    warm_s = {name: row["warm_s"] for name, row in started.items()}
    return {
        "decode": decoded,
        "start": started,
        "smallest_ratio": min(row["ratio"] for plan in ("eight", "missing") for row in decoded[plan]),
        "large_to_small_start_s": warm_s[f"{middle} large"] / warm_s[str(middle)],
        "most_to_fewest_start_s": warm_s[str(args.experts[-1])] / warm_s[str(FEW)],
    }


def shape(args: Args, experts: int, *, large: bool = False) -> Family:
    """The family that all models have the layers of, but for size and number of experts."""
    sizes = {name: getattr(args, name) for name in ("hidden", "top_k", "layers", "vocab")}
    heads: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 64, "token_ids": {}}
    intermediate = args.intermediate * (LARGE if large else 1)
    return replace(FAMILIES["qwen3-30b-a3b"], **sizes, **heads, intermediate=intermediate, experts=experts)


def _options(args: Args, few: Path | None) -> dict[str, Any]:
    """How a model is loaded; the one in `few` with places for a token's experts alone."""
    options: dict[str, Any] = {"threads": 1, "context": 512, "device": "cpu", "predictor": "none"}
    if few is not None:
        expert = 6 * args.hidden * args.intermediate * (LARGE if few.name.endswith("large") else 1)
        options["expert_cache"] = args.layers * args.top_k * expert
    return options


def _start(args: Args, folder: Path) -> Result:
    """The seconds that a model takes to load, cold and warm, what is read for it, and what is resident afterwards."""
    drop_page_cache(shards(folder))
    answers = []
    for _ in range(2):
        with Worker(folder.name, engine_command("offload", folder, **_options(args, folder))) as worker:
            answers.append(worker.ask())
    cold, warm = answers
    row = {"cold_s": cold["load_s"], "warm_s": warm["load_s"], "read_bytes": cold["read_bytes"]}
    return row | {"rss_bytes": warm["rss_bytes"], "checkpoint_bytes": size_bytes(folder)}


def _decodes(args: Args, folders: Mapping[int, Path]) -> dict[str, list[Result]]:
    """By plan, a row a model: seconds a token, and the tokens/s as a share of the first model's."""
    result: dict[str, list[Result]] = {}
    for places, plans in PLANS.items():
        with ExitStack() as stack:
            engines = {}
            for experts, folder in folders.items():
                engines[experts] = load("offload", folder, **_options(args, folder if places else None))
                stack.callback(engines[experts].close)
            for plan in plans:
                note(f"decoding: {plan}")
                result[plan] = _compared(args, partial(_window, args, plan, engines))
    note("decoding: products")
    up, down = (2 * args.intermediate, args.hidden), (args.hidden, args.intermediate)
    one = [torch.empty(size, dtype=DTYPE).normal_(std=0.02) for size in (up, down)]
    weights = {n: [[[side.clone() for side in one] for _ in range(n)] for _ in range(args.layers)] for n in folders}
    result["products"] = _compared(args, lambda experts, _: _products(args, experts, weights[experts]))
    return result


def _compared(args: Args, window: Callable[[int, int], Result]) -> list[Result]:
    """A row a model: medians, without the first window, and the speed as a share of the first model's."""
    rows = {experts: own[1:] for experts, own in in_turn(args.experts, args.repetitions + 1, window).items()}
    first = rows[FEW]
    return [{"experts": n, **medians(own), "ratio": ratio_of("s_per_token", first, own)} for n, own in rows.items()]


def _window(args: Args, plan: str, engines: Mapping[int, Engine], experts: int, _: int) -> Result:
    """One model's figures."""
    warm_up = 2 * (args.experts[-1] // args.top_k if plan == "all" else FEW)
    tokens = args.tokens + warm_up
    with TraceRouter(engines[experts].model, routes(plan, experts, args.layers, args.top_k, tokens)):
        answer = decode(engines[experts], random_ids(tokens, args.vocab, 0), warm_up=warm_up)
    return {"s_per_token": median(answer["seconds"]), "hit_rate": answer["stats"]["hit_rate"]}


def _products(args: Args, experts: int, weights: list[list[list[torch.Tensor]]]) -> Result:
    """What the experts' products of a token take, in the order of the plan that uses all of them."""
    x = torch.ones(1, args.hidden, dtype=DTYPE)

    def token(chosen: list[list[int]]) -> None:
        for layer, ids in zip(weights, chosen, strict=True):
            for up, down in (layer[expert] for expert in ids):
                torch.mm(torch.mm(x, up.t())[:, : args.intermediate], down.t())

    plan = routes("all", experts, args.layers, args.top_k, args.tokens).experts.tolist()
    return {"s_per_token": median(timed(partial(token, chosen))() for chosen in plan), "hit_rate": 1.0}


if __name__ == "__main__":
    arguments = Arguments(__doc__, tokens=60, repetitions=7)
    arguments.option("--folder", None, "where models are written, if not in /tmp", type=Path)
    arguments.option("--experts", [FEW, 16, 32, 64, 128], f"a layer, ascending multiples of {FEW}, which is the first")
    arguments.option("--layers", 6, "of each model")
    arguments.option("--hidden", 512, "width of hidden states")
    arguments.option("--intermediate", 256, "width inside an expert")
    arguments.option("--top-k", 4, "experts a token goes to")
    arguments.option("--vocab", 4096, "tokens it knows")
    arguments.option("--starts", 5, "of each model")
    raise SystemExit(arguments.run(benchmark))
