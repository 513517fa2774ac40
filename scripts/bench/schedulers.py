"""How far schedulers are from the best assignment: makespans of random layers, as shares of the optimum's.

    python scripts/bench/schedulers.py
    python scripts/bench/schedulers.py --mixed      # transfers of three sizes in a layer

Every layer is on a machine of its own, drawn at random, log-uniformly where a range spans more than a factor of three:

- expert: 5 to 350 MB; link: 3 to 30 GB/s; the CPU reads weights at 10 to 100 GB/s;
- the CPU is 1 to 10 times slower than the accelerator for one token of an expert, and 2 to 50 times (not less than for
  one) for 64; in between, the CPU's time is linear in tokens, and so is the accelerator's, which for 64 tokens takes
  1 to 2 times what it takes for one. The CPU needs 10 to 200 microseconds a layer to get going.

It has 4 to 10 experts, each cached with a probability of 10 to 90 %. Their tokens fall with rank by a power law with an
exponent of .5 to 1.5, from 8 to 64 in half of the layers (prefill) and from 1 to 4 in the others (decode), down to one;
ranks are at random. With --mixed every expert's transfer takes all, half or a quarter of its time, as if the layer's
experts were stored at 16, 8 and 4 bits. The seed decides everything: the same figures come out everywhere, microseconds
excepted. Those are medians of one call, in this interpreter. The last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from math import exp, log
from statistics import mean, median
from typing import Any, NamedTuple

from cache.types import Phase
from offload.decide.schedulers.base import Costs, Load, make_scheduler, scheduler_names
from scripts.bench.common import Arguments, markdown, note

RULES = [*(name for name in scheduler_names() if name != "optimal"), "dali(serial=True)", "hybrimoe(paper=True)"]


class Layer(NamedTuple):
    """One event, and what it costs."""

    phase: Phase
    loads: list[Load]
    costs: Costs


def spread(rng: random.Random, low: float, high: float) -> float:
    """Log-uniform."""
    return exp(rng.uniform(log(low), log(high)))


def random_costs(rng: random.Random) -> Costs:
    """A machine and a model."""
    expert_bytes = spread(rng, 5e6, 350e6)
    cpu_one_s = expert_bytes / spread(rng, 10e9, 100e9)
    slower_for_one = spread(rng, 1, 10)
    slower_for_many = max(slower_for_one, spread(rng, 2, 50))
    gpu_one_s = cpu_one_s / slower_for_one
    gpu_many_s = gpu_one_s * rng.uniform(1, 2)
    cpu_many_s = gpu_many_s * slower_for_many
    return Costs(
        gpu_s=lambda tokens: gpu_one_s + (gpu_many_s - gpu_one_s) * (tokens - 1) / 63,
        cpu_s=lambda tokens: cpu_one_s + (cpu_many_s - cpu_one_s) * (tokens - 1) / 63,
        copy_s=expert_bytes / spread(rng, 3e9, 30e9),
        cpu_start_s=spread(rng, 10e-6, 200e-6),
    )


def random_layer(rng: random.Random, mixed: bool = False) -> Layer:
    """A layer as the module's docstring says."""
    phase = rng.choice([Phase.PREFILL, Phase.DECODE])
    most = spread(rng, 8, 64) if phase is Phase.PREFILL else spread(rng, 1, 4)
    exponent = rng.uniform(0.5, 1.5)
    hit_rate = rng.uniform(0.1, 0.9)
    tokens = [max(1, round(most / rank**exponent)) for rank in range(1, rng.randint(4, 10) + 1)]
    rng.shuffle(tokens)
    loads = [Load(count, rng.random() < hit_rate) for count in tokens]
    costs = random_costs(rng)
    if mixed:
        loads = [load._replace(copy_s=costs.copy_s / rng.choice([1, 2, 4])) for load in loads]
    return Layer(phase, loads, costs)


def compare(rule: str, layers: Sequence[Layer], best_s: Sequence[float]) -> dict[str, float]:
    """How much longer than the best: the mean, the worst and the shares of layers; and microseconds a call."""
    ratios, took_s = [], []
    scheduler = make_scheduler(rule)
    for layer, best in zip(layers, best_s, strict=True):
        scheduler.reset()  # layers are independent: nobody keeps to what was good for the last one
        began = time.perf_counter()
        assignment = scheduler.assign(layer.loads, layer.costs)
        took_s.append(time.perf_counter() - began)
        ratios.append(assignment.makespan_s / best)
    decode, prefill = (
        mean(ratio for ratio, layer in zip(ratios, layers, strict=True) if layer.phase is phase)
        for phase in (Phase.DECODE, Phase.PREFILL)
    )
    return {
        "mean": mean(ratios),
        "decode_mean": decode,
        "prefill_mean": prefill,
        "p95": sorted(ratios)[int(0.95 * len(ratios))],
        "worst": max(ratios),
        "optimal_share": mean(ratio < 1 + 1e-9 for ratio in ratios),
        "microseconds": 1e6 * median(took_s),
    }


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Every rule on the same layers, the nearest to the optimum first."""
    rng = random.Random(args.seed)
    layers = [random_layer(rng, args.mixed) for _ in range(args.layers)]
    optimal = make_scheduler("optimal")
    best_s = [optimal.assign(layer.loads, layer.costs).makespan_s for layer in layers]
    note(f"{len(layers)} layers, {sum(layer.phase is Phase.PREFILL for layer in layers)} of them of prompts")
    rows = {rule: compare(rule, layers, best_s) for rule in ("optimal", *args.rules)}
    rows = dict(sorted(rows.items(), key=lambda item: item[1]["mean"]))
    forms = dict.fromkeys(("mean", "decode_mean", "prefill_mean", "p95", "worst"), ".3f")
    forms |= {"optimal_share": ".0%", "microseconds": ".0f"}
    lines = [[f"`{rule}`", *(format(row[name], form) for name, form in forms.items())] for rule, row in rows.items()]
    print(markdown(["scheduler", "mean", "decode", "prefill", "95 %", "worst", "optimal", "µs"], lines))
    return {"schedulers": rows}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__)
    arguments.option("--layers", 1000, "to assign")
    arguments.option("--mixed", False, "experts of several sizes in a layer")
    arguments.option("--seed", 0, "another one makes other layers")
    arguments.option("--rules", RULES, "schedulers to compare", metavar="SCHEDULER")
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
