"""What a layer's experts cost beside their arithmetic: our call against the same linears and gate in a bare loop.

    python scripts/bench/overhead.py

One token, K experts, all of them hits, on one thread: everything but the products is the interpreter's, torch's and
ours. By default the experts are slivers that stay in the processor's cache, so that times are steady. Both sides of a
pair are timed one after the other, and the median of the differences counts. Pages of memory that the calls touch for
the first time are counted: none, once everything is warm.
"""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cache.types import ExpertKey, Phase
from offload.engine.hook import offload_experts_forward
from offload.engine.outputs import compute_expert
from offload.engine.protocols import HANDLE
from offload.model import OffloadedModel
from scripts.bench.common import Args, Arguments, Result, show, timed
from scripts.bench.families import FAMILIES
from scripts.bench.make_checkpoint import write_checkpoint

EXPERTS, TOP_K, HIDDEN = 16, 8, 2048
WARM_UP = 200


def benchmark(args: Args) -> Result:
    """Both precisions, on a checkpoint of two layers."""
    sizes: dict[str, Any] = {"hidden": HIDDEN, "intermediate": args.intermediate, "experts": EXPERTS, "top_k": TOP_K}
    sizes |= {"heads": 4, "kv_heads": 2, "head_dim": 32, "layers": 2, "vocab": 256, "token_ids": {}}
    with TemporaryDirectory(prefix="offload-overhead-") as folder:
        write_checkpoint(replace(FAMILIES["qwen3-30b-a3b"], **sizes), Path(folder, "model"))
        rows = {experts: measure(Path(folder), experts, args.repetitions) for experts in ("auto", "nf4")}
    show(rows)
    return rows


def measure(folder: Path, experts: str, repetitions: int) -> Result:
    """The medians for one precision, in microseconds."""
    store: dict[str, Any] = {} if experts == "auto" else {"expert_store": folder / "store"}
    with OffloadedModel.from_pretrained(folder / "model", device="cpu", threads=1, experts=experts, **store) as model:
        model(torch.arange(1, 129)[None])  # every expert becomes resident
        module = [each for each in model.module.modules() if hasattr(each, HANDLE)][-1]
        runtime, layer = getattr(module, HANDLE)
        runtime.phase = Phase.DECODE
        chosen, tier = range(0, EXPERTS, EXPERTS // TOP_K), runtime.manager.computing.tier
        generator = torch.Generator().manual_seed(0)
        index, weights = torch.tensor([[*chosen]]), torch.rand(1, TOP_K, generator=generator).bfloat16()
        hidden = torch.randn(1, HIDDEN, generator=generator).bfloat16()
        bare = [runtime.weights(layer, 0, [runtime.engine.slot(tier, ExpertKey(layer.index, e))]) for e in chosen]
        ours_s = timed(lambda: offload_experts_forward(module, hidden, index, weights))
        bare_s = timed(lambda: [compute_expert(module, hidden, parameters) for parameters in bare])
        with torch.inference_mode():
            for _ in range(WARM_UP):
                ours_s(), bare_s()
            model.reset_stats()
            faults = _faults()
            pairs = [(ours_s(), bare_s()) for _ in range(repetitions)]
            faults = _faults() - faults
        hit_rate = model.stats.hit_rate
    return {
        "hit_rate": hit_rate,
        "ours_us": round(1e6 * median(ours for ours, _ in pairs), 1),
        "bare_us": round(1e6 * median(bare for _, bare in pairs), 1),
        "overhead_us": round(1e6 * median(ours - bare for ours, bare in pairs), 1),
        "page_faults_per_call": faults / repetitions,
    }


def _faults() -> int:
    """Pages that this process has touched for the first time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    arguments = Arguments(__doc__, repetitions=3000)
    arguments.option("--intermediate", 64, "width inside an expert")
    raise SystemExit(arguments.run(benchmark))
