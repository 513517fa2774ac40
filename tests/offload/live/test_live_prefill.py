"""Reading prompts in a live model: no way to do it costs a bit or a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from live_model import WILD, always_on, check_books, drive, open_model
from logs import first_difference, twin

from cache.errors import PolicyError
from cache.types import Phase, Tier
from offload.decide.prefetch import Prefetcher
from predictors.base import make_predictor


@pytest.mark.parametrize("pool", ["global", "layer"])
@pytest.mark.parametrize("way", ["streamed", "kept", "on-demand"])
@pytest.mark.parametrize("slots", [3, 7, 16, 24])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_no_way_to_read_a_prompt_changes_a_bit(folder: Path, device: str, slots: int, way: str, pool: str) -> None:
    """Prompts one after another, short and in chunks; a batch of padded rows; a host cache smaller than a layer."""
    resident = tiny.resident(folder)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    runs: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (tiny.ids(1, 90), {"prefill_chunk_size": 32}),
        (tiny.ids(1, 60, seed=1), {}),
        (tiny.ids(2, 40, seed=2), {"attention_mask": mask, "prefill_chunk_size": 16}),
        (tiny.ids(1, 3, seed=3), {}),
    ]
    with open_model(folder, slots, device=device, prefill=way, pool=pool, predictor="none") as model:
        manager = model.parts.runtime.manager
        if device == "emulated" and pool == "global":
            manager.caches[1].capacities[0] = 6 * manager.stacks.sizes[0]  # less than there is memory for
        for ids, more in runs:
            arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **more}
            assert torch.equal(model.generate(ids, **arguments), resident.generate(ids, **arguments))
        model.parts.runtime.settle()
        manager.check_integrity()
        counts = check_books(model)
        assert all(cache.peak_bytes <= cache.capacity_bytes for cache in manager.caches)
        assert (counts.prefetches > 0) == (way == "streamed" and slots > 3)


@pytest.mark.parametrize("predictor", ["none", WILD])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_live_run_that_streams_is_decided_again(folder: Path, device: str, predictor: str) -> None:
    with open_model(folder, 12, device=device, predictor=predictor) as model:
        if predictor != "none":
            always_on(model)
        manager = model.parts.runtime.manager
        manager.log = log = []
        for seed in range(2):
            model.generate(tiny.ids(1, 90, seed=seed), max_new_tokens=5, do_sample=False, prefill_chunk_size=32)
        drive(model)
    streamed = [decision for decision in log if decision.prefetches and decision.event.phase is Phase.PREFILL]
    assert sum(len(decision.prefetches) for decision in streamed) > 10
    again = twin(manager, model.rules)
    if predictor != "none":
        again.prefetcher = Prefetcher(make_predictor(predictor, 3, 8), 2, adaptive=False)
    assert first_difference(log, again) is None


def test_ways_that_do_not_exist_are_refused(folder: Path) -> None:
    with pytest.raises(PolicyError, match='--prefill "all": prompts are read streamed, kept, on-demand, or auto'):
        tiny.open_model(folder, prefill="all")


def test_prompts_are_streamed_with_a_fallback_if_it_is_asked_for(folder: Path) -> None:
    with tiny.open_model(folder, fallback="cache-prior") as model:
        assert model.parts.runtime.manager.prefill is None  # by itself nothing is fetched ahead: two runs are alike
        model.use_prefill("streamed")
        prefill = model.parts.runtime.manager.prefill
        assert prefill is not None and prefill.streams


def test_the_way_can_be_changed(folder: Path) -> None:
    ids = tiny.ids(1, 60)
    with open_model(folder, 12) as model:
        for way, ranked in (("streamed", True), ("on-demand", False), ("kept", True), ("auto", True)):
            model.use_prefill(way)
            assert (model.parts.runtime.manager.prefill is not None) == ranked
            model.reset_stats()
            model.generate(ids, max_new_tokens=2, do_sample=False)
            counts = model.stats.tiers[Tier.CPU].counts
            assert (counts.prefetches > 0) == (way in ("streamed", "auto"))
        model.use_predictor(WILD)
        assert model.parts.runtime.manager.prefill is not None
