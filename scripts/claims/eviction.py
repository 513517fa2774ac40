"""Claims about what to evict."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.traces.passes import one_by_one
from cache.traces.trace import Trace
from scripts.claims.claim import claim, row
from scripts.claims.replays import hits, misses
from scripts.claims.workloads import Workload, batched

QUARTER, HALF, MOST = "25%", "50%", "75%"


@claim(
    "HybriMoE",
    "2504.05897",
    "MRS hits more than LRU",
    theirs="MRS / LRU with a quarter resident: Mixtral 36.2 / 30.2, DeepSeek-V2-Lite 52.7 / 47.7, Qwen2 52.8 / 45.0; "
    "with three quarters: Mixtral 83.3 / 80.6",
    ours="MRS / LRU with a quarter; MRS / LRU with three quarters. A cache for each layer, warm, held out",
    command="offload replay T --policy mrs,lru --capacity 25%,75% --warm",
    why="MRS wants the scores of all experts; the trace of gpt-oss has the weights of the chosen ones alone",
)
def mrs(work: Workload) -> str:
    pairs = [row(*(hits(work.held_out, policy, share) for policy in ("mrs", "lru"))) for share in (QUARTER, MOST)]
    return "; ".join(pairs)


@claim(
    "HOBBIT",
    "2411.01433",
    "its four terms cost less in misses than LRU and LFU",
    theirs="the price of misses: 4.7 to 8.7 % less than LRU's, 2.1 to 4.2 % less than LFU's; LFU by sequence hits 4.5 "
    "points more than by model (Mixtral, Phi)",
    ours="misses less than LRU's / than LFU's, in percent, with a quarter; LFU cold less LFU warm, points",
    command="offload replay T --policy hobbit,lru,lfu --capacity 25%",
    why="every miss costs the same here: precisions are a part of their own; their weights are unpublished",
)
def hobbit_terms(work: Workload) -> str:
    own, lru, lfu = (misses(work.held_out, policy, QUARTER, warm=False) for policy in ("hobbit", "lru", "lfu"))
    sequence = lfu - misses(work.held_out, "lfu", QUARTER, warm=True)
    return f"{row(1 - own / lru, 1 - own / lfu)}; {-100 * sequence:+.1f}"


@claim(
    "HOBBIT",
    "2411.01433",
    "each of the four terms helps",
    theirs="LRU, LFU, LHU and FLD weigh together; none alone is as good (figure only)",
    ours="misses with all four; without recency / frequency / high-precision use / layer distance, a quarter, cold",
    command='offload replay T --policy "hobbit(lru=0)" --capacity 25%',
    why="high-precision uses are all uses where there is one precision, so the third term doubles the second",
)
def hobbit_ablation(work: Workload) -> str:
    specs = ("hobbit", "hobbit(lru=0)", "hobbit(lfu=0)", "hobbit(lhu=0)", "hobbit(fld=0)")
    return row(*(misses(work.held_out, spec, QUARTER, warm=False) for spec in specs))


@claim(
    "LFRU (Zhang)",
    "2608.07911",
    "the rule f / (age + 1) is the best without training, and half of its misses need not be",
    theirs="misses a step, Qwen3-30B-A3B, 40 % resident, batches of 8: LFU 19.1, LFRU 18.0, static 19.4, Belady 9.9",
    ours="misses as percent of uses: LFU / LFRU / static / Belady, 40 %, batches of 8, warm",
    command="offload replay T --policy lfu,lfru,static,belady --capacity 40% --warm",
)
def lfru(work: Workload) -> str:
    trace = batched(work.held_out, min(8, work.held_out.num_sequences))
    profile = work.learnt
    return row(*(misses(trace, policy, "40%", profile=profile) for policy in ("lfu", "lfru", "static", "belady")))


@claim(
    "LFRU (Zhang)",
    "2608.07911",
    "replaying use by use overstates misses",
    theirs="misses more when an event is replayed use by use: LRU +27.4 %, LFRU +28.5, LFU +3.4, Belady +4.3 "
    "(Qwen3-30B-A3B, 40 %, batches of 8)",
    ours="the same for LRU / LFRU / LFU / Belady, 40 %, single sequences, warm",
    why="with one token an event has 4 experts, and a cache of 40 % holds 13: few are evicted within their own event",
)
def one_by_one_overstates(work: Workload) -> str:
    apart = one_by_one(work.held_out)
    return row(
        *(misses(apart, p, "40%") / misses(work.held_out, p, "40%") - 1 for p in ("lru", "lfru", "lfu", "belady"))
    )


@claim(
    "Least-Stale (SpecMD)",
    "2602.03921",
    "what this pass has not touched goes first",
    theirs="collision misses 1.6 to 1.9 %, LRU's 4.5 to 12.6 %, with 5 % of the experts; over 88 % hits on OLMoE",
    ours="hits of least-stale / LRU, one cache for all layers, 10 % and 25 %, warm",
    command="offload replay T --policy least-stale,lru --capacity 10%,25% --pool global --warm",
    why="theirs counts what a prefetch collides with; on demand the two differ where a pass needs more than fits",
)
def least_stale(work: Workload) -> str:
    shares = ("10%", QUARTER)
    return "; ".join(row(*(hits(work.held_out, p, s, pool="global") for p in ("least-stale", "lru"))) for s in shares)


@claim(
    "Read-ME",
    "2410.19123",
    "with routes known beforehand Belady is exact",
    theirs="random / LRU / Belady with 3 of 8: 50.1 / 52.4 / 61.8, 4: 67.5 / 67.0 / 77.2, 5: 82.9 / 83.5 / 88.0",
    ours="random / LRU / Belady with 3 / 8, 4 / 8 and 5 / 8 of the experts, warm",
    command="offload replay T --policy random,lru,belady --capacity 37.5%,50%,62.5% --warm",
)
def read_me(work: Workload) -> str:
    shares = ("37.5%", HALF, "62.5%")
    return "; ".join(row(*(hits(work.held_out, p, s) for p in ("random", "lru", "belady"))) for s in shares)


@claim(
    "Expert buffering",
    "2303.06182",
    "what this batch does not use goes first, then the last loaded",
    theirs="LIFO misses less than FIFO and LRU, and nearly as little as Belady, under balance (Switch, figure)",
    ours="misses of LIFO / FIFO / LRU / Belady, batches of 8, a quarter, warm",
    command="offload replay T --policy lifo,fifo,lru,belady --capacity 25% --warm",
    why="theirs decodes a batch of dozens whose union is all experts, in the order of ids, where LIFO is right",
)
def expert_buffering(work: Workload) -> str:
    trace = batched(work.held_out, min(8, work.held_out.num_sequences))
    return row(*(misses(trace, policy, QUARTER) for policy in ("lifo", "fifo", "lru", "belady")))


@claim(
    "SeqMoE",
    "2609.12978",
    "LRU's hits by capacity",
    theirs="60.0 / 74.2 / 84.5 / 86.4 / 88.5 with 15 / 25 / 35 / 40 / 45 %",
    ours="the same; and Belady's with a quarter",
    command="offload replay T --policy lru,belady --capacity 15%,25%,35%,40%,45% --warm",
)
def lru_by_capacity(work: Workload) -> str:
    shares = ("15%", QUARTER, "35%", "40%", "45%")
    found = row(*(hits(work.held_out, "lru", share) for share in shares))
    return f"{found}; {row(hits(work.held_out, 'belady', QUARTER))}"


@claim(
    "ExpertFlow",
    "2410.17954",
    "regrouped batches use fewer experts",
    theirs="tokens of two batches, sorted by routing: 1.03 to 1.17 times the speed (Switch)",
    ours="experts a layer's event uses in batches of 4: as they come / sorted by the step before / by the step itself",
    why="sorting by the step before is what a server could do; by the step itself is the most there is to gain",
)
def regrouping(work: Workload) -> str | None:
    if work.held_out.num_sequences < 4:
        return None
    return " / ".join(f"{used:.2f}" for used in unions(work.held_out, 4 if work.held_out.num_sequences >= 8 else 2))


def unions(trace: Trace, size: int) -> list[float]:
    """The mean number of experts in an event of batches of `size`, out of pools of two batches: as sequences come, and
    sorted into two groups at every step by where their tokens went a step before, or go now."""
    used = np.zeros(3)
    events = 0
    offsets = trace.sequence_offsets
    for first in range(0, trace.num_sequences - 2 * size + 1, 2 * size):
        pool = range(first, first + 2 * size)
        steps = min(int(offsets[s + 1] - offsets[s]) for s in pool)
        went = np.zeros((2 * size, steps, trace.num_layers, trace.num_experts), np.bool_)
        for place, s in enumerate(pool):
            np.put_along_axis(went[place], trace.experts[offsets[s] : offsets[s] + steps].astype(np.int64), True, -1)
        for step in range(1, steps):
            now, before = went[:, step], went[:, step - 1]
            as_is = np.arange(2 * size)
            for way, order in enumerate((as_is, _grouped(before), _grouped(now))):
                used[way] += now[order[:size]].any(0).sum() + now[order[size:]].any(0).sum()
            events += 2 * trace.num_layers
    return [float(each) / events for each in used]


def _grouped(went: NDArray[np.bool_]) -> NDArray[np.intp]:
    """An order in which the first half and the second are alike among themselves: two balanced means, a few turns."""
    rows = went.reshape(len(went), -1).astype(np.float32)
    apart = (rows[:, None] != rows[None]).sum(-1)
    one, other = np.unravel_index(apart.argmax(), apart.shape)
    order = np.argsort(apart[one] - apart[other], kind="stable")
    half = len(went) // 2
    for _ in range(4):
        means = rows[order[:half]].mean(0), rows[order[half:]].mean(0)
        distance = ((rows - means[0]) ** 2).sum(1) - ((rows - means[1]) ** 2).sum(1)
        order = np.argsort(distance, kind="stable")
    return order
