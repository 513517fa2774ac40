"""What a plan sets aside where experts have several precisions, or layers are divided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from cache.types import Tier
from offload.options import PlanOptions
from offload.plan.prepare import make_plan


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("shares") / "model", "mixtral", torch.bfloat16)


def test_a_plan_divides_the_memory(checkpoint: Path) -> None:
    options = PlanOptions(cpu_mem="8G", device="cpu", context=64, experts="auto,nf4", fallback="hobbit(low_share=.5)")
    plan = make_plan(checkpoint, replace(options, expert_cache="120K", dtype="bf16"))
    high, low = plan.pools
    assert (high.name, low.name) == ("bf16", "nf4") and high.slot_bytes > low.slot_bytes
    assert (
        sum(pool.slot_bytes * pool.slots[Tier.CPU] for pool in plan.pools) == plan.cache_bytes[Tier.CPU] <= 120 * 1024
    )
    assert low.slots[Tier.CPU] > high.slots[Tier.CPU] > 0
    note = "--expert-store has no effect"
    assert not any(note in each for each in plan.notes)
    there = make_plan(checkpoint, PlanOptions(cpu_mem="8G", context=64, expert_store="there"))
    assert any(note in each for each in there.notes)
    whole = make_plan(checkpoint, replace(options, fallback="resident-low", expert_cache="1K"))
    assert whole.pools[1].slots[Tier.CPU] == whole.experts and whole.pools[0].slots[Tier.CPU] == 0


def test_the_cpus_share_has_its_place_in_the_plan(checkpoint: Path) -> None:
    def share(**given: Any) -> int:
        plan = make_plan(checkpoint, PlanOptions(device="emulated", dtype="fp32", gpu_mem="1G", cpu_mem="3G", **given))
        items = {item.what: item for item in plan.items if item.tier is Tier.CPU}
        assert ("the CPU's share" in items) == bool(given)
        return items["the CPU's share"].nbytes // plan.chunk if given else 0

    assert share() == 0
    # Of a token: two experts' rows in and out, 64 numbers each, and three times what one expert has in between.
    assert share(scheduler="auto") == share(preset="hybrimoe") == 4 * (2 * 2 * 64 + 3 * 192)
