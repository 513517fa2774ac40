"""Published systems as compositions of parts that this project has, one row each. Torch-free.

docs/presets.md has the same rows, and says what differs from what was published and why.
"""

from __future__ import annotations

from offload.decide.preset import Preset

PUBLISHED = (
    Preset(
        name="fate",
        policy="arc",
        pool="layer",
        quota="shallow",
        predictor="cross-layer-gate",
        prefetcher="fate",
        prefetch_depth=1,
        source="Fate, arXiv 2502.12224",
        differs="an eighth of the layers is resident, instead of as many as are badly predicted; experts as they are, "
        "instead of INT4, and INT2 for the least popular quarter while reading prompts (add --experts int4,int2 "
        "--fallback fate)",
    ),
    Preset(
        name="hybrimoe",
        policy="mrs",
        pool="layer",
        predictor="cross-layer-gate",
        prefetcher="hybrimoe",
        prefetch_depth=3,
        scheduler="hybrimoe",
        placement="random",
        source="HybriMoE, arXiv 2504.05897",
        differs="while reading prompts it schedules, too, and streams no more than `--prefill` does",
    ),
    Preset(
        name="hobbit",
        policy="hobbit",
        predictor="cross-layer-gate",
        prefetcher="hobbit",
        prefetch_depth=3,
        experts="auto,nf4",
        fallback="hobbit(skip=True)",
        source="HOBBIT, arXiv 2411.01433",
        differs="NF4 for INT4; the precision of a prefetch goes by an expert's place among those expected; the weights "
        "of the policy's terms are ours",
    ),
    Preset(
        name="edgemoe",
        policy="edgemoe",
        predictor="transition(order=2, reach=1)",
        prefetcher="speculative(n=3)",
        prefetch_depth=1,
        experts="nf4,int2",
        fallback="edgemoe",
        source="EdgeMoE, arXiv 2308.14352",
        differs="NF4 and INT2, unless --experts names another pair; importance is estimated, not measured one expert "
        "at a time, and the budget is a share of it; the eviction formula was not published in full",
    ),
    Preset(
        name="moe-infinity",
        policy="moe-infinity",
        predictor="activation-matrix",
        prefetcher="moe-infinity",
        source="MoE-Infinity, arXiv 2401.14361",
        differs="without a profile it goes by the sequence alone",
    ),
    Preset(
        name="finemoe",
        policy="finemoe",
        predictor="expert-map(nearest=1)",
        prefetcher="finemoe",
        prefetch_depth=3,
        source="FineMoE (fMoE), arXiv 2502.05370",
        differs="the maps kept are evenly spaced passes of the profile, instead of the most different ones; without "
        "embeddings in the profile they are found by trajectory alone",
    ),
    Preset(
        name="adapmoe",
        policy="lru",
        pool="layer",
        quota="dp",
        predictor="ensemble(parts=('cross-layer-gate', 'first-layers'))",
        prefetcher="hobbit(mixed=False)",
        prefetch_depth=3,
        fallback="adapmoe(skip=True)",
        source="AdapMoE, arXiv 2408.10284",
        differs="layers share by the hits that LRU would have had, instead of a formula of prefetch accuracy; "
        "first layers are guessed by ids, and not by a trained gate; experts as they are, instead of 4 bits; of more "
        "than two experts a token, all but the first are judged; sensitivity is a divergence, in units of its mean",
    ),
    Preset(
        name="mixtral-offloading",
        policy="lru",
        pool="layer",
        predictor="cross-layer-gate",
        prefetcher="speculative(n=2)",
        prefetch_depth=1,
        source="mixtral-offloading, arXiv 2312.17238",
        differs="experts as they are, instead of 2 to 3 bits (add --experts int4)",
    ),
    Preset(
        name="expertflow",
        policy="lru",
        pool="layer",
        quota="plec",
        predictor="path",
        prefetcher="read-me(least=0.5)",
        source="ExpertFlow, arXiv 2410.17954",
        differs="a regression on what a pass reads and on the pass before for a transformer; a layer's share of the "
        "cache goes by its uses of late; slots are recycled between passes, and not within one; batches are not "
        "regrouped",
    ),
    Preset(
        name="d2moe",
        policy="lfu",
        experts="int4>int3>int2",
        fallback="d2moe",
        source="D2MoE, arXiv 2504.15299",
        differs="the rule that chooses bits is not trained: it goes by the router weight that a token has from an "
        "expert on, with thresholds that keep to a mean; what is not in time is fetched behind, for later events",
    ),
    Preset(
        name="fiddler",
        policy="static",
        scheduler="cpu-only",
        placement="popular",
        source="Fiddler, arXiv 2402.07033",
        differs="it computes on the CPU while reading prompts, too, where Fiddler may fetch; experts that do not fit "
        "in RAM come from disk",
    ),
    Preset(
        name="freetoken",
        policy="lru",
        scheduler="ratio",
        source="FreeToken, arXiv 2608.16157",
        differs="the missing experts with the most tokens are fetched first, instead of those that came back last",
    ),
    Preset(
        name="expert-buffering",
        policy="expert-buffering",
        pool="layer",
        source="Expert buffering (MoE-Deployment), arXiv 2303.06182",
        differs="what a batch uses beyond its layer's places passes through, where the last of it stays; copies "
        "overlap what is computed, and no exchange between devices; no dynamic gating",
    ),
    Preset(
        name="monde",
        policy="lru",
        scheduler="monde",
        source="MoNDE, arXiv 2405.18832",
        differs="the CPU in place of a processor beside the memory; what was moved stays in a cache, and is not moved "
        "again while it is there",
    ),
    Preset(
        name="se-moe",
        policy="fifo",
        predictor="every",
        prefetcher="ring(layers=3)",
        source="SE-MoE, arXiv 2205.10034",
        differs="the ring takes places of a cache that may have more of them, and what stays there is used; a load "
        "that has not begun when its layer is routed is taken back if it is not needed; on one device; the number of "
        "layers is ours",
    ),
    Preset(
        name="dali",
        policy="dali",
        pool="layer",
        predictor="cross-layer-gate",
        prefetcher="speculative(n=1)",
        prefetch_depth=1,
        scheduler="dali",
        source="DALI, arXiv 2602.03495",
        differs="gates are asked with the hidden state as it is, without the mean residual; what is fetched ahead "
        "takes a place of the cache, the idlest expert's; experts outside count wherever they were computed, and "
        "come only for ones with fewer tokens; the exchange's sizes, and one expert ahead, are ours",
    ),
)
