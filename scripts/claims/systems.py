"""Claims about whole systems, as replays under the simulated clock: hits and speed with experts on an accelerator."""

from __future__ import annotations

from functools import partial
from typing import Any

from offload.decide.preset import DEFAULT
from scripts.claims.claim import claim, percent, row
from scripts.claims.replays import hits, run
from scripts.claims.workloads import Workload, batched


def there(work: Workload, preset: str, capacity: str = "25%", **parts: Any) -> float:
    """Hits, with those that were on their way."""
    found = run(work, preset, capacity, **parts)
    return found.hit_rate + found.late_hit_rate


@claim(
    "Fate",
    "2502.12224",
    "hits rise from demand to paths to gates to shallow layers",
    theirs="99.1 % hits with all of it; decoding up to 4.1 times as fast as on demand, up to 2.2 times as fast as with "
    "paths (Qwen1.5-MoE and DeepSeek-MoE, RTX 3090)",
    ours="hits, those on their way included: ARC on demand / with paths / with gates / with gates and shallow layers; "
    "with a quarter of the experts, then a half",
    command="offload replay T --preset fate --quota even --machine M --device gpu --capacity 25% --warm",
)
def fate_ladder(work: Workload) -> str | None:
    if work.whole.predicted is None:
        return None
    steps: list[dict[str, Any]] = [
        {"predictor": "none", "quota": "even"},
        {"predictor": "activation-matrix", "quota": "even"},
        {"quota": "even"},
        {},
    ]
    return "; ".join(row(*(there(work, "fate", share, **step) for step in steps)) for share in ("25%", "50%"))


@claim(
    "HybriMoE",
    "2504.05897",
    "scheduling, prefetching and caching help apart, and together most",
    theirs="Qwen2, a quarter resident, seconds a token: .21 without, .14 scheduling, .18 prefetching, .15 caching, .11 "
    "with all: 1.50, 1.17, 1.40 and 1.91 times the speed (A6000, 10 cores)",
    ours="times the speed of a static map whose rest the CPU computes: scheduling / prefetching / MRS / all, a quarter",
    command="offload replay T --preset hybrimoe --policy static --machine M --device gpu --capacity 25% --warm",
)
def hybrimoe_ablation(work: Workload) -> str:
    base: dict[str, Any] = {"policy": "static", "scheduler": "cpu-only", "placement": "popular", "predictor": "none"}
    steps: list[dict[str, Any]] = [
        {**base, "scheduler": "hybrimoe"},
        {**base, "predictor": "cross-layer-gate" if work.whole.predicted is not None else "logistic", "policy": "lru"},
        {**base, "policy": "mrs"},
        {},
    ]
    speed = partial(run, work, "hybrimoe")
    before = speed(**base).tokens_per_s
    return " / ".join(f"{speed(**step).tokens_per_s / before:.2f}" for step in steps)


@claim(
    "MoE-Infinity",
    "2401.14361",
    "on tasks that come again it hits more than LRU",
    theirs="decoding 3.1 to 16.7 times as fast as other engines (DeepSeek-V2-Lite, A5000; vLLM, Mixtral-Offloading)",
    ours="hits, those on their way included, of the preset / of LRU with one cache; new tasks; tasks that go on; "
    "batches of 4 of the latter",
    command="offload replay T --preset moe-infinity --profile P --machine M --device gpu --capacity 25% --warm",
)
def moe_infinity(work: Workload) -> str:
    return repeated(work, "moe-infinity")


@claim(
    "FineMoE",
    "2502.05370",
    "on requests like those before it hits more than MoE-Infinity and LRU",
    theirs="a token takes 22 % less time than with MoE-Infinity, 38 % less than with Mixtral-Offloading (6 RTX 3090)",
    ours="hits, those on their way included, of the preset / of LRU with one cache; new tasks; tasks that go on; "
    "batches of 4 of the latter",
    command="offload replay T --preset finemoe --profile P --machine M --device gpu --capacity 25% --warm",
)
def finemoe(work: Workload) -> str:
    return repeated(work, "finemoe")


def repeated(work: Workload, preset: str) -> str:
    """A preset beside LRU: on held-out sequences, on second halves of known ones, and on batches of these."""
    found = []
    for trace, profile in (
        (work.held_out, work.learnt),
        (work.gone_on, work.begun),
        (batched(work.gone_on, min(4, work.gone_on.num_sequences)), work.begun),
    ):
        own = run(work, preset, trace=trace, profile=profile)
        found.append(row(own.hit_rate + own.late_hit_rate, hits(trace, "lru", "25%", pool="global")))
    return "; ".join(found)


@claim(
    "Fiddler",
    "2402.07033",
    "the popular experts on the accelerator hit more than any others",
    theirs="hits of Mixtral's 256 experts, popular / random / worst: 25.2 / 21.9 / 18.4 % with 56 of them on the GPU, "
    "53 % with 125",
    ours="hits with a quarter, then a half: the profile's popular experts / random ones; neither ever changes",
    command="offload replay T --preset fiddler --profile P --machine M --device gpu --capacity 25% --warm",
)
def fiddler(work: Workload) -> str:
    return "; ".join(
        row(*(run(work, "fiddler", share, placement=name).hit_rate for name in ("popular", "random")))
        for share in ("25%", "50%")
    )


@claim(
    "ExpertFlow",
    "2410.17954",
    "a path predicted before the pass hits more than LRU, in batches, too",
    theirs="hits with 16 of 32 experts, batches of 4 and 16: 91.9 and 85.9 %, LRU 76.6 and 58.4 (Switch-32)",
    ours="hits, those on their way included, of the preset / of LRU, a half: single sequences; batches of 4",
    command="offload replay T --preset expertflow --machine M --device gpu --capacity 50% --warm",
    why="its network sees whole prompts, and Switch-32 sends a token to one expert of a layer",
)
def expertflow(work: Workload) -> str:
    found = []
    for trace in (work.held_out, batched(work.held_out, min(4, work.held_out.num_sequences))):
        own = run(work, "expertflow", "50%", trace=trace)
        found.append(row(own.hit_rate + own.late_hit_rate, hits(trace, "lru", "50%")))
    return "; ".join(found)


@claim(
    "FreeToken",
    "2608.16157",
    "a global LRU whose misses two processors divide beats static maps",
    theirs="misses 16 and 39 % (two models); KTransformers 41 and 59, a static map 62 and 89",
    ours="misses: the preset / experts chosen beforehand, a quarter; times the speed of the latter",
    command="offload replay T --preset freetoken,fiddler --profile P --machine M --device gpu --capacity 25% --warm",
)
def freetoken(work: Workload) -> str:
    own, static = run(work, "freetoken"), run(work, "fiddler")
    return f"{row(1 - own.hit_rate, 1 - static.hit_rate)}; {own.tokens_per_s / static.tokens_per_s:.2f}"


@claim(
    "HOBBIT",
    "2411.01433",
    "thresholds at .6 and .9 serve 67, 30 and 3 % of misses at high and low precision and not at all",
    theirs="67 / 30 / 3 % (Mixtral, top-2); loading by precision 1.19 to 1.57 times the speed",
    ours="uses at the best precision / at the lower one / left out; times the speed with every expert as it is",
    command="offload replay T --preset hobbit --machine M --device gpu --capacity 25% --warm",
    why="with four experts a token, three of them stand behind others, so more of them are thought less of",
)
def hobbit_shares(work: Workload) -> str:
    own = run(work, "hobbit")
    best, *lower = own.precision_shares.values()
    plain = run(work, "hobbit", experts="auto", fallback="none")
    return f"{row(best, sum(lower), own.skipped_share)}; {own.tokens_per_s / plain.tokens_per_s:.2f}"


@claim(
    "mixtral-offloading",
    "2312.17238",
    "LRU and one guessed layer help where experts come over a link",
    theirs="Mixtral with 2 to 3 bits an expert: 2 to 3 tokens/s on free hardware; hits by cache size (figure)",
    ours="hits, those on their way included, without / with guessing; times the speed of the former",
    command="offload replay T --preset mixtral-offloading --machine M --device gpu --capacity 25% --warm",
)
def mixtral_offloading(work: Workload) -> str | None:
    if work.whole.predicted is None:
        return None
    own, without = run(work, "mixtral-offloading"), run(work, "mixtral-offloading", predictor="none")
    speed = own.tokens_per_s / without.tokens_per_s
    return f"{row(without.hit_rate, own.hit_rate + own.late_hit_rate)}; {speed:.2f}"


@claim(
    "DALI",
    "2602.03495",
    "its greedy assignment comes near the best one",
    theirs="92 % of the optimum",
    ours="speed as a share of that with all splits tried, LRU, a quarter: greedy / HybriMoE's walk",
    command="offload replay T --scheduler dali --machine M --device gpu --capacity 25% --warm",
)
def greedy(work: Workload) -> str:
    speed = {
        name: run(work, DEFAULT, trace=work.replies, policy="lru", predictor="none", scheduler=name).tokens_per_s
        for name in ("optimal", "dali", "hybrimoe")
    }
    return " / ".join(percent(speed[name] / speed["optimal"]) for name in ("dali", "hybrimoe"))
