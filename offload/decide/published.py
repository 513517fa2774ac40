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
        "instead of INT4 (add --experts int4)",
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
        differs="NF4 and INT2 for pairs of INT8, INT4 and INT2; the eviction formula was not published in full",
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
        "first layers are guessed by ids, and not by a trained gate; experts as they are, instead of 4 bits; layers' "
        "sensitivity is measured with renormalised gates, and skipping runs without",
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
        experts="int4>int2",
        fallback="deadline",
        source="D2MoE, arXiv 2504.15299",
        differs="levels of 2 and 4 bits, without 3; bits are chosen by what arrives in time alone, and not by a router",
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
)
