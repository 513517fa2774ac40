"""Models with little room for experts, prompts that drive them, and the books of what they prefetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

from offload.decide.prefetch import Prefetcher
from offload.model import OffloadedModel

WILD = "wild_predictor:Wild"


def open_model(folder: Path, slots: float, **kwargs: Any) -> OffloadedModel:
    """With room for so many experts on the tier that computes."""
    with tiny.open_model(folder, **{k: v for k, v in kwargs.items() if k in ("device", "link")}) as model:
        slot = model.plan.slot_bytes
    return tiny.open_model(folder, expert_cache=int(slots * slot), **kwargs)


def always_on(model: OffloadedModel) -> Prefetcher:
    """The model's prefetcher, which must not be switched off."""
    prefetcher = model.parts.runtime.manager.prefetcher
    assert prefetcher is not None
    prefetcher.switch = None
    return prefetcher


def check_books(model: OffloadedModel) -> Any:
    """What was prefetched is one of useful, wasted, cancelled, or not decided yet; gives the counts."""
    manager = model.parts.runtime.manager
    counts = manager.stats[manager.computing.tier]
    decided = counts.useful_prefetches + counts.wasted_prefetches + counts.cancelled_prefetches
    assert 0 <= counts.prefetches - decided <= manager.computing.capacity_bytes // manager.stacks.sizes[0]
    return counts


def drive(model: Any) -> None:
    """Prompts of several lengths, a padded batch, sampling, and a prompt read in chunks."""
    model.generate(tiny.ids(1, 7), max_new_tokens=12, do_sample=False)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    model.generate(tiny.ids(2, 6, seed=1), attention_mask=mask, max_new_tokens=10, do_sample=True)
    model.generate(tiny.ids(1, 33, seed=2), max_new_tokens=9, prefill_chunk_size=8, do_sample=False)
