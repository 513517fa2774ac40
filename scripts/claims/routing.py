"""Claims about routing itself."""

from __future__ import annotations

from offload.traces.info import trace_info
from scripts.claims.claim import claim, row
from scripts.claims.replays import hits
from scripts.claims.workloads import Workload


@claim(
    "moe-lrc",
    "2505.16056",
    "segments of 16 tokens share their experts",
    theirs="SRP of 16 tokens: 78.2 (LLaMA-MoE-v2) to 19.3 (Switch); Qwen3-30B 54.1, OLMoE 50.9, Mixtral 49.4",
    ours="SRP of 16 tokens",
    command="offload trace info T",
)
def srp(work: Workload) -> str:
    segments = trace_info(work.held_out)["segments"]
    return row(next(each["srp"] for each in segments if each["length"] == 16))


@claim(
    "moe-lrc",
    "2505.16056",
    "a cache that knows the next 16 tokens comes near to Belady",
    theirs="hits as a share of the clairvoyant cache's, with 1, 2 and 3 times K: LRU 56.5 / 67.0 / 75.3, LFU 61.9 / "
    "70.9 / 78.4, SCH of 16 81.0 / 90.6 / 96.2",
    ours="the same shares: LRU; LFU; SCH of 16. A cache for each layer, warm",
    command="offload replay T --policy lru,lfu,sch,belady --warm",
    why="theirs counts first touches as hits while the cache fills",
)
def sch(work: Workload) -> str:
    trace = work.held_out
    sizes = [f"{100 * times * trace.top_k / trace.num_experts}%" for times in (1, 2, 3)]
    best = [hits(trace, "belady", size) for size in sizes]

    def shares(policy: str) -> str:
        return row(*(hits(trace, policy, size) / most for size, most in zip(sizes, best, strict=True)))

    return "; ".join(map(shares, ("lru", "lfu", "sch(m=16)")))
