"""Quotas in a live model: outputs stay, decisions can be made again, and what fits stays where shares change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from live_model import WILD, always_on, check_books, drive, open_model
from logs import first_difference, twin

from cache.errors import PolicyError
from cache.quota import Quota, make_quota, names
from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.engine.starting_over import start_over
from offload.model import OffloadedModel

ARGUMENTS = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}


class Restless(Quota):
    """Another layer has nearly everything, pass after pass."""

    every_pass = True
    turn = 0

    def observe(self, event: RoutingEvent) -> None:
        self.turn = event.step % self.num_layers

    def divide(self, total: int) -> list[int]:
        slots = [0] * self.num_layers
        for layer in range(self.turn, self.turn + self.num_layers):
            slots[layer % self.num_layers] = min(total - sum(slots), self.num_experts)
        return slots


RESTLESS = f"{__name__}:Restless"
LIVELY = "plec(rate=0.2, uses=6)"


def held(model: OffloadedModel) -> set[ExpertKey]:
    """What the computing tier has, when nothing is on its way."""
    model.parts.runtime.settle()
    return set(model.parts.runtime.manager.computing.resident())


def lanes(model: OffloadedModel) -> list[list[int]]:
    """How many experts each layer has room for, cache by cache."""
    stacks = model.parts.runtime.manager.stacks
    return [
        [nbytes // size for nbytes in cache.capacities]
        for caches, size in zip(stacks.by_slice, stacks.sizes, strict=True)
        for cache in caches
    ]


def in_order(model: OffloadedModel) -> None:
    """Caches are as they should be, hold what has a place, and no more than the plan gave them."""
    parts = model.parts
    parts.runtime.settle()
    parts.runtime.manager.check_integrity()
    for slice_, caches in enumerate(parts.runtime.manager.stacks.by_slice):
        for cache in caches:
            assert parts.runtime.engine.held(cache.tier, slice_) == set(cache.resident())
            assert cache.peak_bytes <= cache.capacity_bytes == model.plan.cache_bytes[cache.tier]


@pytest.mark.parametrize("slots", [2, 7, 13])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("quota", [*names(), RESTLESS])
def test_no_quota_changes_a_bit(folder: Path, expected: Any, quota: str, device: str, slots: int) -> None:
    with open_model(folder, slots, device=device, quota=quota, predictor=WILD, prefetch_depth=2) as model:
        assert model.rules.pool == "layer" and model.rules.quota == quota
        always_on(model)
        for seed in range(3):
            ids = tiny.ids(1, 9, seed=seed)
            assert torch.equal(model.generate(ids, **ARGUMENTS), expected.generate(ids, **ARGUMENTS))
        assert sum(lanes(model)[0]) == slots
        in_order(model)
        check_books(model)


@pytest.mark.parametrize("policy", ["arc", "slru", "s3fifo", "sieve", "recall(bypass=True)"])
def test_policies_that_look_at_the_cache_follow(folder: Path, expected: Any, policy: str) -> None:
    ids = tiny.ids(1, 9)
    with open_model(folder, 10, quota=RESTLESS, policy=policy) as model:
        for _ in range(2):
            assert torch.equal(model.generate(ids, **ARGUMENTS), expected.generate(ids, **ARGUMENTS))
        cache = model.parts.runtime.manager.computing
        assert cache.policy.lanes.slots.tolist() == lanes(model)[0]
        in_order(model)


@pytest.mark.parametrize("quota", [*names(), RESTLESS, LIVELY])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_live_run_is_decided_again(folder: Path, device: str, quota: str) -> None:
    with open_model(folder, 9, device=device, quota=quota, predictor="frequency") as model:
        manager = model.parts.runtime.manager
        manager.log = log = []
        drive(model)
        drive(model)
        model.parts.runtime.settle()
    assert any(decision.dropped for decision in log) or quota not in (RESTLESS, LIVELY)
    assert first_difference(log, twin(manager, model.rules)) is None


def test_what_still_fits_stays_when_the_quota_changes(folder: Path, expected: Any) -> None:
    ids = tiny.ids(1, 9)
    with open_model(folder, 12, quota="even", predictor="none", prefill="on-demand") as model:
        manager = model.parts.runtime.manager
        model.generate(ids, **ARGUMENTS)
        before = held(model)
        assert lanes(model) == [[4, 4, 4]]
        model.use_quota("shallow")
        assert held(model) == before and model.rules.quota == "shallow", "nothing happens before the next event"
        manager.log = log = []
        assert torch.equal(model.generate(ids, **ARGUMENTS), expected.generate(ids, **ARGUMENTS))
        assert lanes(model) == [[8, 2, 2]]
        dropped = [key for _, _, keys in log[0].dropped for key in keys]
        kept = before - set(dropped)
        assert [key.layer for key in dropped] == [1, 1, 2, 2], "each layer that lost two places lost two experts"
        assert {key for key in kept if key.layer == 0} == {key for key in before if key.layer == 0}
        gone = {key for decision in log for fetch in decision.fetches for _, keys in fetch.evicted for key in keys}
        assert kept - gone <= held(model)
        in_order(model)


@pytest.mark.parametrize("quota", ["dp", "distinct"])
def test_without_a_profile_it_learns_from_prompt_to_prompt(folder: Path, quota: str) -> None:
    with open_model(folder, 10, quota=quota, predictor="none") as model:
        manager = model.parts.runtime.manager
        manager.log = log = []
        model.generate(tiny.ids(1, 9), **ARGUMENTS)
        assert lanes(model) == [[4, 3, 3]] and not any(decision.dropped for decision in log)
        for seed in (1, 2):
            model.generate(tiny.ids(1, 9, seed=seed), **ARGUMENTS)
        prompts = [i for i, d in enumerate(log) if d.event.phase is Phase.PREFILL and d.event.layer == 0]
        assert len(prompts) == 3
        before = make_quota(quota, 3, 8)
        for decision in log[: prompts[-1]]:
            before.observe(decision.event)
        assert lanes(model) == [before.slots(10)], "by all that was used before the last prompt"
        start_over(model.parts.runtime)
        model.generate(tiny.ids(1, 9), **ARGUMENTS)
        assert lanes(model) == [[4, 3, 3]], "forgotten, as all the rest"


def test_a_profile_divides_once(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    with open_model(folder, 10) as model, model.record_trace(path):
        model.generate(tiny.ids(1, 9), **ARGUMENTS)
    with open_model(folder, 10, quota="dp", profile=path) as model:
        seen = []
        for seed in range(3):
            model.generate(tiny.ids(1, 9, seed=seed), **ARGUMENTS)
            seen.append(lanes(model))
        assert seen[0] == seen[1] == seen[2] and sum(seen[0][0]) == 10
        model.use_quota("distinct")
        assert model.parts.steering.rules.profile is not None
        model.generate(tiny.ids(1, 9), **ARGUMENTS)
        assert sum(lanes(model)[0]) == 10


def test_several_slices_are_divided_each(folder: Path) -> None:
    with tiny.open_model(folder, experts="int8>int4", fallback="resident-low", device="emulated") as model:
        room = model.plan.cache_bytes[Tier.GPU]
    options = {"experts": "int8>int4", "fallback": "resident-low", "device": "emulated", "expert_cache": room // 3}
    with tiny.open_model(folder, quota=RESTLESS, **options) as model:
        for seed in range(3):
            model.generate(tiny.ids(1, 9, seed=seed), **ARGUMENTS)
        stacks, plan = model.parts.runtime.manager.stacks, model.plan
        assert [sum(each) for each in lanes(model)] == [
            plan.slots(cache.tier, i) for i, caches in enumerate(stacks.by_slice) for cache in caches
        ]
        model.parts.runtime.settle()
        model.parts.runtime.manager.check_integrity()


def test_what_means_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(PolicyError, match=r"--quota dp divides .* --pool global"):
        tiny.open_model(folder, quota="dp", pool="global")
    with pytest.raises(PolicyError, match="no quota is called"):
        tiny.open_model(folder, quota="fair")
    with open_model(folder, 10) as model, pytest.raises(PolicyError, match="with --pool global all have one"):
        model.use_quota("dp")
    with open_model(folder, 10, preset="fate", pool="global") as model:
        assert model.rules.quota is None
    with open_model(folder, 10, preset="hobbit", quota="shallow", experts="auto", fallback="none") as model:
        assert model.rules.pool == "layer"
