"""The tables of offload/simulation/mix.py: hit rates by the share of experts that a cache holds, from a recorded trace.

    python scripts/bench/typical_locality.py gpt-oss-20b.mmlu.safetensors

The default policy, one cache for all layers, through the live decision loop: generation after generation, each reads a
prompt and decodes more, the first one uncounted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cache.traces.trace import Trace
from cache.types import Tier
from offload.decide.rules import Rules
from offload.plan.budgets import Plan, Pool
from offload.plan.work import Work
from offload.simulation.mix import counted, hit_rate

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


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("trace", type=Path, help="a recorded routing trace")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--tokens", type=int, default=128, help="of each reply (default 128)")
    parser.add_argument("--generations", type=int, default=16, help="default 16")
    args = parser.parse_args(argv)
    trace = Trace.open(args.trace)
    work = Work(trace.num_experts, trace.top_k, "any", "any", 1, 0, 0)
    print("share of experts  decode  prefill  experts of a prompt's layer")
    for share in SHARES:
        mix = counted(
            plan_of(trace, share, args.prompt_tokens),
            work,
            trace,
            Rules().settled(simple=True),
            prompt_tokens=args.prompt_tokens,
            tokens=args.tokens,
            generations=args.generations,
        )
        union = sum(n * (kind.hits + kind.reads) for kind, n in mix.prefill[0].items())
        print(f"{share:16.0%}  {hit_rate(mix.decode):6.3f}  {hit_rate(mix.prefill[0]):7.3f}  {union:6.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
