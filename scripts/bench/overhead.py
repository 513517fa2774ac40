"""What a layer's experts cost beside their arithmetic: our call against the same linears and gate in a bare loop.

    python scripts/bench/overhead.py

One token, K experts, all of them hits, on one thread: everything but the products is the interpreter's, torch's and
ours. The experts are slivers that stay in the processor's cache, so that times are steady; both sides of a pair are
timed one after the other, and the median of the differences counts. The goal is less than 100 microseconds a layer.
Also counts the pages of memory that the calls touch for the first time: none, once everything is warm. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cache.types import ExpertKey, Phase
from offload.engine.hook import compute_expert, offload_experts_forward
from offload.engine.protocols import HANDLE
from offload.model import OffloadedModel
from scripts.bench.common import Arguments, show, timed
from scripts.bench.families import FAMILIES
from scripts.bench.make_checkpoint import write_checkpoint

EXPERTS, WARM_UP = 16, 200


def measure(folder: Path, experts: str, args: argparse.Namespace) -> dict[str, Any]:
    """The medians for one precision, in microseconds."""
    store: dict[str, Any] = {} if experts == "auto" else {"expert_store": folder / "store"}
    with OffloadedModel.from_pretrained(folder / "model", device="cpu", threads=1, experts=experts, **store) as model:
        model(torch.arange(1, 129)[None])  # every expert becomes resident
        module = [each for each in model.module.modules() if hasattr(each, HANDLE)][-1]
        runtime, layer = getattr(module, HANDLE)
        runtime.phase = Phase.DECODE
        chosen = list(range(0, 2 * args.top_k, 2)) if 2 * args.top_k <= EXPERTS else list(range(args.top_k))
        generator = torch.Generator().manual_seed(0)
        index, weights = torch.tensor([chosen]), torch.rand(1, args.top_k, generator=generator).bfloat16()
        hidden = torch.randn(1, args.hidden, generator=generator).bfloat16()
        tier = runtime.manager.computing.tier
        bare = [runtime.weights(layer, 0, [runtime.engine.slot(tier, ExpertKey(layer.index, e))]) for e in chosen]
        ours_s = timed(lambda: offload_experts_forward(module, hidden, index, weights))
        bare_s = timed(lambda: [compute_expert(module, hidden, parameters) for parameters in bare])
        with torch.inference_mode():
            for _ in range(WARM_UP):
                ours_s(), bare_s()
            model.reset_stats()
            faults = _faults()
            pairs = [(ours_s(), bare_s()) for _ in range(args.repetitions)]
            faults = _faults() - faults
        hit_rate = model.stats.hit_rate
    return {
        "hit_rate": hit_rate,
        "ours_us": round(1e6 * median(ours for ours, _ in pairs), 1),
        "bare_us": round(1e6 * median(bare for _, bare in pairs), 1),
        "overhead_us": round(1e6 * median(ours - bare for ours, bare in pairs), 1),
        "page_faults_per_call": faults / args.repetitions,
    }


def _faults() -> int:
    """Pages that this process has touched for the first time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Every precision, on a checkpoint of two layers."""
    sizes = {name: getattr(args, name) for name in ("hidden", "intermediate", "top_k")}
    small = {"heads": 4, "kv_heads": 2, "head_dim": 32, "experts": EXPERTS, "layers": 2, "vocab": 256}
    family = replace(FAMILIES["qwen3-30b-a3b"], **sizes, **small, token_ids={})  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="offload-overhead-") as name:
        write_checkpoint(family, Path(name, "model"))
        rows = {experts: measure(Path(name), experts, args) for experts in args.experts}
    show(rows)
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, repetitions=3000)
    arguments.option("--experts", ["auto", "nf4"], "precisions")
    arguments.option("--hidden", 2048, "width of hidden states")
    arguments.option("--intermediate", 64, "width inside an expert")
    arguments.option("--top-k", 8, "experts a token")
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
