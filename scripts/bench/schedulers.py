"""How far schedulers are from the best assignment: makespans of random layers, as shares of the optimum's.

    python scripts/bench/schedulers.py
    python scripts/bench/schedulers.py --mixed      # transfers of three sizes in a layer

Every layer is on a machine of its own, and both are drawn at random: `random_layer` and `random_costs` say how. The
same figures come out everywhere, microseconds excepted. Those are medians of one call, in this interpreter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from math import exp, log
from statistics import mean, median
from typing import NamedTuple

from cache.types import Phase
from offload.decide.schedulers.base import Costs, Load, make_scheduler, scheduler_names
from scripts.bench.common import Args, Arguments, Result, markdown

RULES = [*(name for name in scheduler_names() if name != "optimal"), "dali(serial=True)", "hybrimoe(paper=True)"]


class Layer(NamedTuple):
    """One event, and what it costs."""

    phase: Phase
    loads: list[Load]
    costs: Costs


def benchmark(args: Args) -> Result:
    """Every rule on the same layers, the nearest to the optimum first."""
    rng = random.Random(0)
    layers = [random_layer(rng, args.mixed) for _ in range(args.layers)]
    optimal = make_scheduler("optimal")
    best_s = [optimal.assign(layer.loads, layer.costs).makespan_s for layer in layers]
    rows = {rule: compare(rule, layers, best_s) for rule in ("optimal", *args.rules)}
    rows = dict(sorted(rows.items(), key=lambda item: item[1]["mean"]))
    lines = ([f"`{rule}`", *(f"{value:.3f}" for value in row.values())] for rule, row in rows.items())
    print(markdown(["scheduler", "mean", "decode", "prefill", "95 %", "worst", "optimal", "µs"], lines))
    return {"schedulers": rows}


def spread(rng: random.Random, low: float, high: float) -> float:
    """Log-uniform."""
    return exp(rng.uniform(log(low), log(high)))


def random_costs(rng: random.Random) -> Costs:
    """A machine and a model: both processors' times are linear in tokens, and known for one and for 64."""
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


def random_layer(rng: random.Random, mixed: bool) -> Layer:
    """Its tokens fall with rank by a power law; `mixed`, as if its experts were stored at 16, 8 and 4 bits."""
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
    took_s: list[float] = []
    ratios: dict[Phase, list[float]] = {Phase.DECODE: [], Phase.PREFILL: []}
    scheduler = make_scheduler(rule)
    for layer, best in zip(layers, best_s, strict=True):
        scheduler.reset()  # layers are independent: nobody keeps to what was good for the last one
        began = time.perf_counter()
        assignment = scheduler.assign(layer.loads, layer.costs)
        took_s.append(time.perf_counter() - began)
        ratios[layer.phase].append(assignment.makespan_s / best)
    every = sorted(ratio for each in ratios.values() for ratio in each)
    return {
        "mean": mean(every),
        "decode_mean": mean(ratios[Phase.DECODE]),
        "prefill_mean": mean(ratios[Phase.PREFILL]),
        "p95": every[int(0.95 * len(every))],
        "worst": every[-1],
        "optimal_share": mean(ratio < 1 + 1e-9 for ratio in every),
        "microseconds": 1e6 * median(took_s),
    }


if __name__ == "__main__":
    arguments = Arguments(__doc__)
    arguments.option("--layers", 1000, "to assign")
    arguments.option("--mixed", False, "experts of several sizes in a layer")
    arguments.option("--rules", RULES, "schedulers to compare", metavar="SCHEDULER")
    raise SystemExit(arguments.run(benchmark))
