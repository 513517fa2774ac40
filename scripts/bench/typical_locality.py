"""The tables of offload/simulation/mix.py: hit rates by the share of experts that a cache holds, from a recorded trace.

    python scripts/bench/typical_locality.py gpt-oss-20b.mmlu.safetensors

The default policy, one cache for all layers, through the live decision loop: generation after generation, each reads a
prompt and decodes more, the first one uncounted.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cache.traces.trace import Trace
from cache.types import Tier
from offload.decide.rules import Rules
from offload.plan.budgets import Plan, Pool
from offload.plan.work import Work
from offload.simulation.mix import counted, hit_rate
from scripts.bench.common import Arguments, show

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def plan_of(trace: Trace, share: float, chunk: int) -> Plan:
    """A CPU that caches this share of the trace's experts, each of one byte."""
    experts = trace.num_layers * trace.num_experts
    slots = {Tier.CPU: round(share * experts)}
    return Plan(
        model=trace.model,
        device="cpu",
        dtype="none",
        context=chunk,
        chunk=chunk,
        slot_bytes=1,
        layers=trace.num_layers,
        experts=experts,
        readers=1,
        places=1,
        cpu_mem_bytes=0,
        gpu_mem_bytes=None,
        cache_bytes=slots,
        pools=(Pool("any", 1, slots),),
        items=(),
    )


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """A row for each share."""
    trace = Trace.open(args.trace)
    work = Work(trace.num_experts, trace.top_k, "any", "any", 1, 0, 0)
    rows = {}
    for share in SHARES:
        mix = counted(
            plan_of(trace, share, args.prompt),
            work,
            trace,
            Rules().settled(),
            prompt_tokens=args.prompt,
            tokens=args.tokens,
            generations=args.repetitions,
        )
        union = sum(n * (kind.hits + kind.reads) for kind, n in mix.prefill[0].items())
        row = {"decode": hit_rate(mix.decode), "prefill": hit_rate(mix.prefill[0])}
        rows[f"{share:.0%}"] = row | {"experts_of_a_prompt's_layer": union}
    show(rows, "hit rates by the share of experts")
    return {"rows": rows}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return Arguments(__doc__, "trace", prompt=128, tokens=128, repetitions=16).run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
