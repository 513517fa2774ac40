"""A model whose layers are divided between an emulated accelerator and the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from cache.types import Tier
from offload.model import OffloadedModel

LAYERS, EXPERTS = 3, 8


def open_model(folder: Path, scheduler: str, gpu: int = 4, **kwargs: Any) -> OffloadedModel:
    """With room for `gpu` experts on the accelerator."""
    return tiny.open_model(folder, device="emulated", scheduler=scheduler, expert_cache=gpu * tiny.SLOT + 999, **kwargs)


def small_host(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """Host memory has room for so many experts only: a budget cannot be so exact."""
    from offload.plan.budgets import Plan

    original = Plan.slots
    monkeypatch.setattr(
        Plan, "slots", lambda plan, tier, slice_=0: slots if tier is Tier.CPU else original(plan, tier, slice_)
    )
