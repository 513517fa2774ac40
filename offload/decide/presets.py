"""Published systems as compositions of parts that this project has: one table. Torch-free.

A preset says which policy, pool, quota, predictor, prefetch rule, precisions, fallback, scheduler and placement run
together. It sets what the user did not: a flag of one's own wins. docs/presets.md compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cache.errors import PolicyError
from cache.policy import find_policy
from offload.decide.fallbacks.base import find_fallback, make_fallback
from offload.decide.placements.base import EMPTY
from offload.decide.prefetchers.base import OURS
from offload.decide.schedulers.base import divides
from offload.decide.sharing import nothing_to_share
from offload.options import PlanOptions
from predictors.base import find_predictor

PARTS = (
    *("policy", "pool", "quota", "predictor", "prefetcher", "prefetch_depth"),
    *("experts", "fallback", "scheduler", "placement"),
)
"""What a preset sets: the names of flags, and of `from_pretrained`'s arguments."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One composition; what is not said is what runs without a preset, but for the predictor, which then is "auto"."""

    name: str
    policy: str = "lfru"
    pool: str = "global"
    quota: str | None = None
    predictor: str = "none"
    prefetcher: str = OURS
    prefetch_depth: int | None = None
    experts: str = "auto"
    fallback: str = "none"
    scheduler: str = "gpu-only"
    placement: str = EMPTY
    source: str
    """Where it was published."""
    differs: str = ""
    """What is not as published."""

    @property
    def parts(self) -> dict[str, Any]:
        """What it sets, by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def divides(self) -> bool:
        """Whether the CPU may compute experts beside an accelerator."""
        return divides(self.scheduler)

    @property
    def lossless(self) -> bool:
        """Whether it leaves what the model says as it is."""
        return self.experts == "auto" and not find_fallback(self.fallback).lossy

    @property
    def learns(self) -> tuple[str, ...]:
        """The flags of its parts that cannot do without a recorded trace."""
        parts = {
            "--policy": find_policy(self.policy).learns,
            "--predictor": self.predictor != "auto" and find_predictor(self.predictor).learns,
        }
        return tuple(flag for flag, learns in parts.items() if learns)

    @property
    def needs_calibration(self) -> bool:
        """Whether `offload calibrate` has to have run."""
        return find_fallback(self.fallback).needs_calibration

    def check_profile(self, profile: object) -> None:
        """Raise PolicyError, saying what to pass, where a part needs a recorded trace and `profile` is None."""
        if profile is None and self.learns:
            who = f"preset {self.name}"
            if self.name == DEFAULT.name:  # the parts are the user's own
                who = " and ".join(f"{flag} {self.parts[flag.strip('-')]}" for flag in self.learns)
            raise PolicyError(
                f"{who} learns from a recorded trace: record one with `offload trace record`, "
                "and name it with --profile"
            )


DEFAULT = Preset(name="default", predictor="auto", source="what runs without a preset")

_TABLE = (
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
        differs="maps are found by trajectory alone, and not by the prompt's embedding",
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
        predictor="logistic",
        prefetch_depth=3,
        source="ExpertFlow, arXiv 2410.17954",
        differs="a regression on the routing so far for a network that predicts all layers beforehand; a layer's need "
        "is predicted from its uses of late; slots are recycled between passes, and not within one; no regrouping of "
        "batches",
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

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _TABLE}
AUTO = "auto"
"""What `offload tune` found best for this model, device and budgets."""


def find_preset(name: str) -> Preset:
    """The published composition of that name, or the one that runs by default. Raises PolicyError."""
    if name == DEFAULT.name:
        return DEFAULT
    if name == AUTO:
        raise PolicyError(
            f"preset {AUTO} is what `offload tune` stored for a model and its budgets: it runs by itself, and is "
            f"none to compare: choose among {', '.join(PRESETS)}"
        )
    if name not in PRESETS:
        raise PolicyError(f'no preset is called "{name}": choose one of {", ".join(PRESETS)}, {AUTO}')
    return PRESETS[name]


def compose(options: PlanOptions, tuned: Callable[[], Preset | None] | None = None) -> Preset:
    """What runs: the parts that `options` state, else what their preset says, else defaults.

    `tuned` says what `offload tune` has stored, asked only for the preset "auto"; where it has nothing, defaults run.
    A preset gives way as a whole where its parts belong together: a depth needs a predictor, and a quota a cache for
    each layer, which it brings along; and several precisions and a fallback that chooses among them come together.
    Raises PolicyError for a name that does not exist.
    """
    chosen = DEFAULT
    if options.preset == AUTO:
        chosen = (None if tuned is None else tuned()) or DEFAULT
    elif options.preset is not None:
        chosen = find_preset(options.preset)
    return overlaid(chosen, **stated_parts(options))


def stated_parts(options: PlanOptions) -> dict[str, Any]:
    """The parts that `options` have, by name; None for those that they leave open."""
    return {name: value for name, value in vars(options).items() if name in PARTS}


def overlaid(preset: Preset, **given: Any) -> Preset:
    """`preset` with the parts that are `given`, as `compose` says. Raises PolicyError."""
    said = {name: value for name, value in given.items() if value is not None}
    own = replace(preset, **said)
    several = several_precisions(own.experts)
    if make_fallback(own.fallback, 1, 1, 2).needs_lower != several and ("experts" in said) != ("fallback" in said):
        # One of the two was said, and the preset's other one does not go with it.
        gone = "fallback" if "experts" in said else "experts"
        own = replace(own, **{gone: getattr(DEFAULT, gone)})
    if own.quota is not None and own.pool == "global":
        if {"quota", "pool"} <= said.keys():
            raise nothing_to_share(own.quota)
        own = replace(own, pool="layer") if "quota" in said else replace(own, quota=None)
    if own.predictor == "none":
        for name in {"prefetcher", "prefetch_depth"} - said.keys():
            own = replace(own, **{name: getattr(DEFAULT, name)})
    return own


def in_each(preset: Preset, **given: Any) -> Preset:
    """`overlaid`, where the same parts are given to many presets: a prefetcher and its depth are for those that have a
    predictor."""
    own = overlaid(preset, **given)
    if own.predictor != "none" or given.get("predictor"):
        return own
    return replace(own, prefetcher=OURS, prefetch_depth=None)


def several_precisions(experts: str) -> bool:
    """Whether `--experts` names more than one."""
    return "," in experts or ">" in experts
