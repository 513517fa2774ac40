"""The tables of offload/simulation/mix.py: hit rates by the share of experts that a cache holds, from a recorded trace.

    python scripts/bench/typical_locality.py gpt-oss-20b.mmlu.safetensors

The default policy, one cache for all layers, through the live decision loop: generation after generation, each reads a
prompt and decodes more, the first one uncounted.
"""

from __future__ import annotations

from typing import Any

from cache.traces.trace import Trace
from cache.types import Tier
from offload.decide.rules import Rules
from offload.plan.budgets import Plan, Pool
from offload.plan.work import Work
from offload.simulation.mix import counted, hit_rate
from scripts.bench.common import Args, Arguments, Result, show

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
UNUSED: dict[str, Any] = {"cpu_mem_bytes": 0, "gpu_mem_bytes": None, "readers": 1, "places": 1, "items": ()}


def benchmark(args: Args) -> Result:
    """A row for each share, on a CPU that caches experts of a byte each."""
    trace = Trace.open(args.trace)
    layers, experts, chunk = trace.num_layers, trace.num_layers * trace.num_experts, args.prompt
    shape = {"layers": layers, "experts": experts, "slot_bytes": 1, "chunk": chunk, "context": chunk, **UNUSED}
    work = Work(trace.num_experts, trace.top_k, "any", "any", 1, 0, 0)
    length = {"prompt_tokens": args.prompt, "tokens": args.tokens, "generations": args.repetitions}
    rows = {}
    for share in SHARES:
        slots = {Tier.CPU: round(share * experts)}
        pools = (Pool("any", 1, slots),)
        plan = Plan(model=trace.model, device="cpu", dtype="none", cache_bytes=slots, pools=pools, **shape)
        mix = counted(plan, work, trace, Rules().settled(), **length)
        union = sum(n * (kind.hits + kind.reads) for kind, n in mix.prefill[0].items())
        row = {"decode": hit_rate(mix.decode), "prefill": hit_rate(mix.prefill[0])}
        rows[f"{share:.0%}"] = row | {"experts_of_a_prompt's_layer": union}
    show(rows, "hit rates by the share of experts")
    return {"rows": rows}


if __name__ == "__main__":
    raise SystemExit(Arguments(__doc__, "trace", prompt=128, tokens=128, repetitions=16).run(benchmark))
