"""Every kind of part: parameters that do not exist are answered with those that do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from cache import policy as policies
from cache import quota as quotas
from cache.errors import PolicyError
from cache.lanes import Lanes
from offload.decide.fallbacks import base as fallbacks
from offload.decide.placements import base as placements
from offload.decide.prefetchers import base as prefetchers
from offload.decide.schedulers import base as schedulers
from predictors import base as predictors

KINDS: dict[str, tuple[Any, Callable[[str], object]]] = {
    "policy": (policies, lambda spec: policies.make_policy(spec, Lanes.shared(2, 4))),
    "quota": (quotas, lambda spec: quotas.make_quota(spec, 2, 4)),
    "predictor": (predictors, lambda spec: predictors.make_predictor(spec, 2, 4)),
    "prefetcher": (prefetchers, prefetchers.make_rule),
    "fallback": (fallbacks, lambda spec: fallbacks.make_fallback(spec, 2, 4, 2)),
    "scheduler": (schedulers, schedulers.make_scheduler),
    "placement": (placements, lambda spec: placements.make_placement(spec, 2, 4)),
}
PARTS = [(kind, name) for kind, (module, _) in KINDS.items() for name in module._registry.names()]


def test_all_kinds_are_here() -> None:
    assert {kind for kind, _ in PARTS} == set(KINDS)
    assert {("policy", "lru"), ("quota", "plec"), ("scheduler", "dali"), ("placement", "random")} < set(PARTS)


@pytest.mark.parametrize(("kind", "name"), PARTS, ids=lambda each: each)
def test_a_parameter_that_does_not_exist_is_answered_with_those_that_do(kind: str, name: str) -> None:
    module, make = KINDS[kind]
    known = [field.name for field in fields(module._registry.find(name).Params)]
    said = f"it has {', '.join(known)}, not bogus" if known else "it takes no parameters"
    with pytest.raises(PolicyError) as refused:
        make(f"{name}(bogus=1)")
    assert f'"{name}(bogus=1)" cannot take these parameters: {said}' in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_does_not_exist_is_answered_with_those_that_do(kind: str) -> None:
    module, make = KINDS[kind]
    with pytest.raises(PolicyError) as refused:
        make("bogus")
    assert ", ".join(module._registry.names()) in str(refused.value)
