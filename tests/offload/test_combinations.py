"""Everything goes with everything: {scheduler} x {fallback} x {predictor} x {prefill} x {policy and quota}, live on a
tiny model.

Each combination answers, gives the resident model's tokens where nothing lossy was asked for, leaves its caches in
order, and decides the same again from its log. `make test` runs a sample of them, `make test-all` all.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from logs import decide_by, first_difference, hold, twin

from offload.decide.fallbacks.base import _registry, find_fallback
from offload.decide.manager import Manager
from offload.decide.prefill import PREFILLS
from offload.decide.schedulers.base import find_scheduler
from offload.decide.schedulers.base import scheduler_names as schedulers
from offload.layers.calibration import Calibration, gates_fingerprint
from offload.model import OffloadedModel
from offload.system.paths import calibration_path, own_place
from predictors.base import find_predictor
from predictors.base import names as predictors

LAYERS, EXPERTS = 3, 8
POLICIES = (("lfru", None), ("lru", "plec(rate=.2, uses=6)"), ("mrs", None))
"""With what divides caches among layers; None: all have one."""
FALLBACKS = (
    ("none", "auto"),
    ("adapmoe(threshold=.5)", "auto,nf4"),
    ("adapmoe(skip=True, threshold=.5)", "auto"),
    ("buddy(similarity=0., later=True)", "auto"),
    ("cache-prior", "auto"),
    ("d2moe", "int4>int3>int2"),
    ("deadline", "int8>int4>int2"),
    ("edgemoe", "auto,nf4"),
    ("fate", "int4,int2"),
    ("hobbit(t1=.3)", "int8>int4"),
    ("hobbit(t1=.3, t2=.5, skip=True)", "auto,int8"),
    ("moe-spec(budget=2)", "auto"),
    ("resident-low", "auto,int8"),
)
PREDICTORS = tuple(name for name in predictors() if find_predictor(name).causal)
SAMPLE = 7
"""In `make test`, of each model opened."""

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


class Combination(NamedTuple):
    """What one run is decided by, beside the fallback and the policy."""

    scheduler: str
    predictor: str
    prefill: str


def combinations(device: str) -> list[Combination]:
    """All there are on a device: without an accelerator there is nothing for a scheduler to divide."""
    names = [name for name in schedulers() if find_scheduler(name).live] if device == "emulated" else ["gpu-only"]
    return [Combination(*parts) for parts in itertools.product(names, PREDICTORS, PREFILLS)]


def test_no_fallback_is_left_out() -> None:
    assert {find_fallback(spec).name for spec, _ in FALLBACKS} == set(_registry.names())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint, calibrated."""
    root = tmp_path_factory.mktemp("combinations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLOAD_CACHE", str(root / "cache"))
        made = tiny.save(root / "model", "mixtral", torch.bfloat16, num_hidden_layers=LAYERS, num_local_experts=EXPERTS)
        with tiny.open_model(made) as model:
            print_ = gates_fingerprint(model.module, model.parts.experts)
            importance = np.random.default_rng(0).random((LAYERS, EXPERTS), np.float32)
            offsets = np.zeros((LAYERS, model.config.hidden_size), np.float32)
            Calibration(print_, offsets, {}, sensitivity=np.ones(LAYERS, np.float32), importance=importance).write(
                own_place(calibration_path(print_))
            )
        yield made


@pytest.fixture(scope="module")
def profile(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of the model, for what learns."""
    path = tmp_path_factory.mktemp("trace") / "profile.safetensors"
    with tiny.open_model(folder) as model, model.record_trace(path):
        for seed in range(4):
            model.generate(tiny.ids(1, 6, seed=seed), max_new_tokens=10, do_sample=False)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[torch.Tensor]:
    """The resident model's tokens."""
    return answers(tiny.resident(folder, torch.bfloat16))


def answers(model: Any) -> list[torch.Tensor]:
    """A prompt read in chunks and a padded batch, each with a reply."""
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        return [
            model.generate(tiny.ids(1, 12, seed=1), max_new_tokens=6, do_sample=False, prefill_chunk_size=8),
            model.generate(tiny.ids(2, 5, seed=2), attention_mask=mask, max_new_tokens=4, do_sample=False),
        ]


def opened(folder: Path, device: str, fallback: str, experts: str, policy: str, quota: str | None) -> OffloadedModel:
    """With room for a third of what there is."""
    given: dict[str, Any] = {"device": device, "fallback": fallback, "experts": experts, "policy": policy}
    given["quota"] = quota
    with tiny.open_model(folder, **given) as model:
        slots = sum(pool.slot_bytes for pool in model.plan.pools)
    return tiny.open_model(folder, expert_cache=LAYERS * EXPERTS * slots // 3, **given)


def run(
    model: OffloadedModel,
    again: Manager,
    combination: Combination,
    fallback: str,
    profile: Path,
    expected: list[torch.Tensor],
) -> None:
    """One combination, with the caches as the one before left them; `again` decides all of it a second time."""
    runtime, manager = model.parts.runtime, model.parts.runtime.manager
    learns = find_predictor(combination.predictor).learns
    depth = None if combination.predictor == "none" else 2
    model.use_predictor(combination.predictor, depth=depth, profile=profile if learns else None)
    model.use_prefill(combination.prefill)
    model.use_scheduler(combination.scheduler)
    decide_by(again, manager, model.rules)
    manager.log = log = []
    found = answers(model)
    runtime.settle()
    manager.check_integrity()
    assert log
    if not find_fallback(fallback).lossy:
        assert all(map(torch.equal, found, expected)), combination
    assert first_difference(log, again) is None, combination


@pytest.mark.parametrize(("policy", "quota"), POLICIES)
@pytest.mark.parametrize(("fallback", "experts"), FALLBACKS, ids=str)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)], ids=["sample", "every"])
def test_everything_goes_with_everything(
    folder: Path,
    profile: Path,
    expected: list[torch.Tensor],
    device: str,
    fallback: str,
    experts: str,
    policy: str,
    quota: str | None,
    every: bool,
    record_property: Any,
) -> None:
    chosen = combinations(device)
    if not every:
        chosen = random.Random(f"{device} {fallback} {policy}").sample(chosen, SAMPLE)
    with opened(folder, device, fallback, experts, policy, quota) as model:
        again = twin(model.parts.runtime.manager, model.rules, fallback)
        hold(again, model.parts.runtime.manager)
        for combination in chosen:
            run(model, again, combination, fallback, profile, expected)
    record_property("combinations", len(chosen))
