"""Presets by name, and what runs when a user names one and some parts beside it. Torch-free.

A preset sets what the user did not: a flag of one's own wins. docs/presets.md compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cache.errors import PolicyError
from offload.costs.precision import NESTED
from offload.decide.fallbacks.base import Fallback, make_fallback
from offload.decide.prefetchers.base import OURS
from offload.decide.preset import DEFAULT, PARTS, Preset
from offload.decide.published import PUBLISHED
from offload.decide.sharing import nothing_to_share
from offload.options import PlanOptions

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in PUBLISHED}
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


def make_fallback_of(preset: Preset, names: Sequence[str], num_layers: int, num_experts: int) -> Fallback:
    """The fallback of `preset` for a model of that shape, whose experts are stored at the precisions `names`, the best
    first. Raises PolicyError where it chooses among several and there is one, and the other way round."""
    chooser = make_fallback(preset.fallback, num_layers, num_experts, len(names))
    if chooser.needs_lower and len(names) == 1:
        better = "auto" if names[0] in ("nf4", *NESTED.values()) else preset.experts
        raise PolicyError(
            f"--fallback {chooser.name} needs a lower precision to fall back to: name it in --experts, "
            f'such as "{better},nf4" or "int8>int4"'
        )
    if not chooser.needs_lower and len(names) > 1:
        but = "" if chooser.name == "none" else f", and {chooser.name} does not"
        raise PolicyError(
            f'--experts "{preset.experts}" names {len(names)} precisions: a --fallback chooses among them{but}'
        )
    return chooser


def several_precisions(experts: str) -> bool:
    """Whether `--experts` names more than one."""
    return "," in experts or ">" in experts
