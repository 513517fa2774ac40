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
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from cache.types import ExpertKey, Phase
from offload.engine.hook import compute_expert, offload_experts_forward
from offload.engine.runtime import HANDLE
from offload.model import OffloadedModel
from scripts.bench.common import run

EXPERTS, WARM_UP = 16, 200


def make_model(folder: Path, hidden: int, intermediate: int, top_k: int) -> None:
    """A checkpoint of two layers of EXPERTS experts."""
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=intermediate,
        num_experts=EXPERTS,
        num_experts_per_tok=top_k,
        vocab_size=256,
        pad_token_id=0,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)


def measure(folder: Path, experts: str, args: argparse.Namespace) -> dict[str, Any]:
    """The medians for one precision, in microseconds."""
    with OffloadedModel.from_pretrained(
        folder, device="cpu", threads=1, experts=experts, expert_store=folder / "store"
    ) as model:
        model(torch.arange(1, 129)[None])  # every expert becomes resident
        modules = [module for module in model.module.modules() if hasattr(module, HANDLE)]
        module = modules[-1]
        runtime, layer = getattr(module, HANDLE)
        runtime.phase = Phase.DECODE
        chosen = list(range(0, 2 * args.top_k, 2)) if 2 * args.top_k <= EXPERTS else list(range(args.top_k))
        index = torch.tensor([chosen])
        weights = torch.rand(1, args.top_k, generator=torch.Generator().manual_seed(0)).bfloat16()
        hidden = torch.randn(1, args.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
        tier = runtime.manager.computing.tier
        bare = [runtime.weights(layer, 0, [runtime.engine.slot(tier, ExpertKey(layer.index, e))]) for e in chosen]
        ours_s, bare_s = [], []
        with torch.inference_mode():
            for repetition in range(WARM_UP + args.repetitions):
                if repetition == WARM_UP:
                    model.reset_stats()
                    faults = _faults()
                begun = time.perf_counter()
                offload_experts_forward(module, hidden, index, weights)
                between = time.perf_counter()
                for parameters in bare:
                    compute_expert(module, hidden, parameters)
                ended = time.perf_counter()
                ours_s.append(between - begun)
                bare_s.append(ended - between)
            faults = _faults() - faults
        hit_rate = model.stats.as_dict()["hit_rate"]
    pairs = list(zip(ours_s[WARM_UP:], bare_s[WARM_UP:], strict=True))
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
    """Every precision."""
    with tempfile.TemporaryDirectory(prefix="offload-overhead-") as name:
        make_model(Path(name), args.hidden, args.intermediate, args.top_k)
        rows = {experts: measure(Path(name), experts, args) for experts in args.experts}
    return {"benchmark": "overhead", "top_k": args.top_k, "hidden": args.hidden, **rows}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--experts", nargs="+", default=["auto", "nf4"], help="precisions (default: auto nf4)")
    parser.add_argument("--hidden", type=int, default=2048, help="width of hidden states (default 2048)")
    parser.add_argument("--intermediate", type=int, default=64, help="width inside an expert (default 64)")
    parser.add_argument("--top-k", type=int, default=8, help="experts a token (default 8)")
    parser.add_argument("--repetitions", type=int, default=3000, help="default 3000")
    args = parser.parse_args(argv)
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
