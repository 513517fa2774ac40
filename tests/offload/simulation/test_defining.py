"""Presets are the systems that they are named after: no two decide alike on the mixture's routing, none of their parts
is without effect there, and each does what its paper is about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest

from cache.traces.trace import Trace
from cache.types import ExpertKey, Phase, Tier
from offload.costs.model import CostModel
from offload.decide.log import Decision
from offload.decide.preset import DEFAULT, PARTS, Preset
from offload.decide.presets import PRESETS
from offload.decide.slices import Slices
from offload.demo.mixture import TRACE
from offload.simulation.clock import run_timed
from offload.simulation.systems import build_manager, own_format, placed_by
from tests.cache.machines import machine

EXPERT_BYTES = 13_000_000
Log = Sequence[Decision]
LAYERS, EXPERTS, TOP_K = 12, 32, 4


@cache
def traces() -> tuple[Trace, Trace]:
    """A prompt and its reply of 60 tokens, and three other sequences as a profile."""
    whole = Trace.open(TRACE)
    first = whole.select([0])
    names = ("experts", "weights", "step", "phase", "scores", "predicted", "ids", "embeddings")
    cut = {name: getattr(first, name)[:92] for name in names}
    return replace(first, sequence_offsets=np.array([0, 92]), **cut), whole.select([1, 3, 5])


@cache
def decided(preset: Preset, long: bool = False) -> Log:
    """What a preset decides: room for a quarter of the experts where they are computed, or, where they take fewer bits,
    for a twelfth of their bytes; all of them behind the link. `long`: of two whole sequences."""
    trace, profile = traces()
    if long:
        trace = Trace.open(TRACE).select([0, 2])
    slices = Slices.of(preset.experts, EXPERT_BYTES, own_format(trace))
    cost = CostModel(machine(), expert_bytes=EXPERT_BYTES, tier=Tier.GPU, dense_layer_bytes=0)
    every = LAYERS * EXPERTS * EXPERT_BYTES
    room = {Tier.GPU: every // (4 if preset.experts == "auto" else 12), Tier.CPU: every}
    compute = [cost] * len(slices.precisions)
    manager = build_manager(trace, preset, room, slices, profile, cost, compute=compute)
    manager.log = log = []
    run_timed(trace, manager, cost, cold=False, compute=compute, placed=placed_by(preset, trace, profile))
    return log


def plans(log: Log) -> list[tuple[Any, ...]]:
    """All of what was decided, event by event."""
    return [
        (
            *(each.event.layer, each.event.experts, each.resident, each.fetches, each.prefetches, each.cancelled),
            *(each.below_best, each.stand_ins, each.on_cpu, each.dropped, each.event.dropped),
        )
        for each in log
    ]


@pytest.mark.parametrize(("one", "other"), list(combinations(PRESETS, 2)))
def test_no_two_presets_decide_alike(one: str, other: str) -> None:
    assert plans(decided(PRESETS[one])) != plans(decided(PRESETS[other]))


OWN = [
    (name, part)
    for name, preset in PRESETS.items()
    for part in PARTS
    if getattr(preset, part) != getattr(DEFAULT, part)
    and part not in ("predictor", "prefetch_depth", "experts", "pool")
]


SLOW = {("expertflow", "quota"), ("monde", "policy")}
"""What has an effect only after a while."""


@pytest.mark.parametrize(("name", "part"), OWN)
def test_every_part_of_a_preset_has_an_effect(name: str, part: str) -> None:
    """It decides otherwise with what runs by default in the place of any of its parts. A predictor with its
    depth, precisions and a pool do not go alone."""
    plain = replace(PRESETS[name], **{part: getattr(DEFAULT, part)})
    if part == "fallback":
        plain = replace(plain, experts=DEFAULT.experts)
    long = (name, part) in SLOW
    assert plans(decided(plain, long)) != plans(decided(PRESETS[name], long))


@dataclass(frozen=True)
class Rule:
    """What a system is known for: `holds` of its decisions, and no longer with `instead` in the place of its parts.

    `within`: parts that are set so in both, where others would hide it.
    """

    holds: Callable[[Log], bool]
    instead: dict[str, Any]
    within: dict[str, Any] = field(default_factory=dict)


def ahead(log: Log) -> Iterator[tuple[int, list[ExpertKey]]]:
    """Of each decision that fetches ahead, its layer and what it fetches of this pass."""
    for each in log:
        keys = [fetch.key for fetch in each.prefetches if fetch.key.layer > each.event.layer]
        if keys and not (each.event.phase is Phase.PREFILL and each.event.layer >= 0):
            yield each.event.layer, keys


def victims(each: Decision) -> set[ExpertKey]:
    """What goes from the accelerator for the fetches of an event."""
    fetches = (*each.fetches, *each.prefetches)
    return {key for fetch in fetches for tier, keys in fetch.evicted if tier is Tier.GPU for key in keys}


def first_layers_stay(log: Log) -> bool:
    """Fate: shallow layers are resident once they were used; deeper ones are not."""
    late = [each for each in log[len(log) // 2 :] if each.event.layer == 0]
    return bool(late) and not any(map(victims, late)) and misses(log, 0) < misses(log, 6)


def misses(log: Log, layer: int) -> int:
    """Fetches on demand for a layer, in the second half."""
    return sum(len(each.fetches) for each in log[len(log) // 2 :] if each.event.layer == layer)


def first_missing_layer_alone(log: Log) -> bool:
    """HOBBIT: what is fetched ahead at one time is all for one layer."""
    found = [keys for _, keys in ahead(log)]
    return bool(found) and all(len({key.layer for key in keys}) == 1 for keys in found)


def one_precision_for_ever(log: Log) -> bool:
    """EdgeMoE: an expert has the same bits in all its uses, and experts differ."""
    seen: dict[ExpertKey, set[int]] = defaultdict(set)
    for each in log:
        below = dict(each.below_best)
        for key in each.event.keys:
            seen[key].add(below.get(key, 0))
    return all(len(bits) == 1 for bits in seen.values()) and len(set().union(*seen.values())) == 2


def to_the_last_layer(log: Log) -> bool:
    """MoE-Infinity: what is fetched ahead may be for any later layer."""
    return max((key.layer - layer for layer, keys in ahead(log) for key in keys), default=0) > 3


def before_the_first_layer(log: Log) -> bool:
    """FineMoE and ExpertFlow: something is fetched as soon as a pass is known to begin, by what it reads."""
    return any(layer < 0 for layer, _ in ahead(log))


def all_layers_before_the_first(log: Log) -> bool:
    """ExpertFlow: then for several layers at once."""
    return any(layer < 0 and len({key.layer for key in keys}) > 3 for layer, keys in ahead(log))


def tokens_are_gated(log: Log) -> bool:
    """AdapMoE: tokens go without some of their experts."""
    return sum(each.event.dropped for each in log) > 0


def two_of_the_next_layer(log: Log) -> bool:
    """mixtral-offloading: at most two guesses at a time, all for the next layer."""
    found = list(ahead(log))
    return bool(found) and all(len(keys) <= 2 and {key.layer for key in keys} == {at + 1} for at, keys in found)


def three_levels(log: Log) -> bool:
    """D2MoE: uses at each of three levels."""
    levels = {bits for each in log for _, bits in each.below_best}
    return {1, 2} <= levels


def nothing_moves(log: Log) -> bool:
    """Fiddler: what is on the accelerator stays there, and nothing comes."""
    return not any(each.fetches and not each.fetches[0].to_host for each in log) and any(each.on_cpu for each in log)


def some_here_and_some_there(log: Log) -> bool:
    """FreeToken: of an event's misses some are fetched, and the others left to the CPU, when nothing is free, too."""
    late = log[len(log) // 2 :]
    return any(each.on_cpu and any(not fetch.to_host for fetch in each.fetches) for each in late)


def last_in_goes_first(log: Log) -> bool:
    """Expert buffering: what goes is the last that came of those that the batch does not use."""
    came: list[ExpertKey] = []
    right = wrong = 0
    for each in log:
        for fetch in sorted(each.fetches, key=lambda fetch: fetch.key):
            here = [key for tier, keys in fetch.evicted if tier is Tier.GPU for key in keys]
            for key in here:
                inactive = [k for k in came if k.layer == key.layer and k not in each.event.keys]
                as_it_should = inactive[-1:] == [key]
                right, wrong = right + as_it_should, wrong + (not as_it_should)
                came = [k for k in came if k != key]
        gone = victims(each)
        came = [key for key in came if key not in gone]
        came += sorted(fetch.key for fetch in (*each.fetches, *each.prefetches) if Tier.GPU in fetch.admitted)
    return right > 20 and right > 10 * wrong


def heaviest_move(log: Log) -> bool:
    """MoNDE: what is moved has no fewer tokens than what is computed beside the memory, and both go on happening."""
    both = 0
    for each in log:
        tokens = dict(zip(each.event.keys, each.event.tokens, strict=True))
        moved = [tokens[fetch.key] for fetch in each.fetches if not fetch.to_host]
        stay = [tokens[key] for key in each.on_cpu if key not in each.resident]
        if moved and stay:
            both += each.event.phase is Phase.DECODE
            if min(moved) < max(stay):
                return False
    return both > 0


def whole_layers_come(log: Log) -> bool:
    """SE-MoE: more of the next layer comes than any token needs, since all of it does."""
    return any(sum(key.layer == at + 1 for key in keys) > 2 * TOP_K for at, keys in ahead(log))


def exchanged_now_and_then(log: Log) -> bool:
    """DALI: a layer gives up at most two experts at a time, and then none for 16 passes."""
    when: dict[int, list[int]] = defaultdict(list)
    for each in log:
        for layer in {key.layer for key in victims(each)}:
            if sum(key.layer == layer for key in victims(each)) > 2:
                return False
            when[layer].append(each.event.step)
    gaps = [b - a for steps in when.values() for a, b in pairwise(steps)]
    return bool(gaps) and min(gaps) >= 15


def random_at_the_start(log: Log) -> bool:
    """HybriMoE: the first event finds experts that nothing chose."""
    return bool(log[0].resident) and any(each.on_cpu for each in log)


ON_DEMAND = {"predictor": "none", "prefetcher": "ours", "prefetch_depth": None}
RULES = {
    "fate": Rule(first_layers_stay, {"quota": "even"}, ON_DEMAND),
    "hybrimoe": Rule(random_at_the_start, {"placement": "empty"}),
    "hobbit": Rule(first_missing_layer_alone, {"prefetcher": "ours"}),
    "edgemoe": Rule(one_precision_for_ever, {"fallback": "resident-low"}),
    "moe-infinity": Rule(to_the_last_layer, {"prefetcher": "ours"}),
    "finemoe": Rule(before_the_first_layer, {"predictor": "logistic"}),
    "adapmoe": Rule(tokens_are_gated, {"fallback": "none"}),
    "mixtral-offloading": Rule(two_of_the_next_layer, {"prefetcher": "ours"}),
    "expertflow": Rule(all_layers_before_the_first, {"prefetcher": "ours"}),
    "d2moe": Rule(three_levels, {"fallback": "deadline", "experts": "int4>int2"}),
    "fiddler": Rule(nothing_moves, {"scheduler": "gpu-only"}),
    "freetoken": Rule(some_here_and_some_there, {"scheduler": "cpu-only"}),
    "expert-buffering": Rule(last_in_goes_first, {"policy": "lru"}),
    "monde": Rule(heaviest_move, {"scheduler": "cpu-only"}),
    "se-moe": Rule(whole_layers_come, {"prefetcher": "ours"}),
    "dali": Rule(exchanged_now_and_then, {"policy": "lru"}, {**ON_DEMAND, "scheduler": "gpu-only"}),
}


def test_every_preset_is_known_for_something() -> None:
    assert RULES.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", RULES)
def test_a_system_does_what_it_is_known_for(name: str) -> None:
    rule = RULES[name]
    own = replace(PRESETS[name], **rule.within)
    assert rule.holds(decided(own))
    assert not rule.holds(decided(replace(own, **rule.instead)))
