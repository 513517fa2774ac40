"""What a timed replay says of a run of bench/prefetch.py, beside what was measured.

    python scripts/bench/prefetch.py /data/qwen3-6l-calm --keep-trace run.safetensors > run.json
    python scripts/bench/replay_prefetch.py run.json run.safetensors --machine machine.json --slots 200 --warm-up 28

The recorded sequence is replayed twice, caches kept, and the measured tokens of the second time are counted: as the
benchmark does, whose caches are warm from the run before. Costs are those of the profile and of Qwen3-30B-A3B's layers.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache
from cache.traces.trace import Trace
from cache.types import Tier
from offload.costs.machine import CopyTime, MachineProfile
from offload.costs.model import CostModel
from offload.decide.manager import Manager
from offload.decide.prefetch import Prefetcher
from offload.simulation.clock import run_timed
from predictors.base import find_predictor, make_predictor

DENSE_LAYER_BYTES, DENSE_PASS_BYTES = 38_300_000, 131_000_000  # attention and router; output head of 32,000 tokens


def seconds(trace: Trace, cost: CostModel, slots: int, predictor: str, depth: int) -> float:
    """What all passes of `trace` take, with room for `slots` experts where they are computed, and all in RAM behind."""
    shape = trace.num_layers, trace.num_experts
    sizes = {cost.tier: slots} if cost.tier is Tier.CPU else {cost.tier: slots, Tier.CPU: shape[0] * shape[1]}
    caches = [
        ExpertCache(tier, [n * cost.expert_bytes], make_policy("lfru", Lanes.shared(*shape, n)))
        for tier, n in sizes.items()
    ]
    prefetcher = None
    if predictor != "none":
        known = None if find_predictor(predictor).causal else trace
        prefetcher = Prefetcher(make_predictor(predictor, *shape, known), min(depth, shape[0]), cost.expert_bytes)
    timeline = run_timed(trace, Manager(caches, cost.expert_bytes, prefetcher), cost, cold=False)
    return sum(time.seconds for time in timeline.phases.values())


def twice(trace: Trace, tokens: int) -> Trace:
    """The recorded sequence, and the first `tokens` of it again."""
    rows = np.r_[0 : trace.num_tokens, 0:tokens]
    return replace(
        trace,
        experts=trace.experts[rows],
        weights=trace.weights[rows],
        step=trace.step[rows],
        phase=trace.phase[rows],
        predicted=None if trace.predicted is None else trace.predicted[rows],
        forward=None,
        sequence_offsets=np.array([0, trace.num_tokens, len(rows)]),
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("result", type=Path, help="the benchmark's JSON line")
    parser.add_argument("trace", help="what it kept with --keep-trace")
    parser.add_argument("--machine", required=True, help="what `offload profile` stored")
    parser.add_argument("--slots", type=int, required=True, help="experts that fit where they are computed")
    parser.add_argument("--warm-up", type=int, default=32, help="the benchmark's (default 32)")
    args = parser.parse_args(argv)
    result = json.loads(args.result.read_text())
    trace, machine = Trace.open(args.trace), MachineProfile.read(args.machine)
    measured = trace.num_tokens - args.warm_up
    link = result.get("link_bytes_per_s")
    for rows, rate in (("rows", link), ("saturated", link and link / 4)):
        if rate and machine.link:
            machine = replace(machine, link=replace(machine.link, pinned=CopyTime(0.0, rate)))
        tier = Tier.CPU if result["device"] == "cpu" else Tier.GPU
        cost = CostModel(
            machine,
            expert_bytes=trace.expert_bytes or 1,
            tier=tier,
            dense_layer_bytes=DENSE_LAYER_BYTES,
            dense_pass_bytes=DENSE_PASS_BYTES,
        )
        for row in result.get(rows, ()):
            rule = args.slots, row["predictor"], row["depth"]
            whole, before = (seconds(twice(trace, n), cost, *rule) for n in (trace.num_tokens, args.warm_up))
            said = (whole - before) / measured
            print(
                f"{rows:10}{row['predictor']:18}{row['depth']}  measured {row['s_per_token']:.4f}  "
                f"predicted {said:.4f}  ratio {row['s_per_token'] / said:.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
