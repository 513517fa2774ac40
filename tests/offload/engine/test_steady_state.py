"""Once everything is warm, a layer's experts ask the system for no memory, and Python's own does not grow."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from cache.types import Phase
from offload.engine.hook import offload_experts_forward
from offload.engine.protocols import HANDLE
from offload.model import OffloadedModel

resource = pytest.importorskip("resource")

CALLS = 400
MANY_CALLS = 4000  # what is new once, such as a counter's larger number, is little beside as many


def faults() -> int:
    """Pages that this process has touched for the first time."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)


@pytest.fixture(params=[("auto", None), ("nf4", None), ("auto", 6), ("nf4", 6)], ids=str)
def calls(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[OffloadedModel, Callable[[int], None]]]:
    """A model whose experts all have a place, or so many of them, and one token's call of its last layer."""
    experts, slots = request.param
    # Large enough that a buffer made anew would be new pages.
    folder = tiny.save(tmp_path / "model", "qwen3_moe", torch.bfloat16, hidden_size=512, moe_intermediate_size=256)
    options: dict[str, Any] = {"experts": experts}
    if experts != "auto":
        options["expert_store"] = tmp_path / "store"
    with tiny.open_model(folder, **options) as model:
        slot = model.plan.slot_bytes
    if slots:
        options["expert_cache"] = slots * slot
    with tiny.open_model(folder, **options) as model:
        model(tiny.ids(1, 60))
        module = [each for each in model.module.modules() if hasattr(each, HANDLE)][-1]
        runtime, _ = getattr(module, HANDLE)
        runtime.phase = Phase.DECODE
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 512, generator=generator).bfloat16()
        weights = torch.rand(1, 3, generator=generator).bfloat16()
        chosen = [torch.randperm(8, generator=generator)[None, :3] for _ in range(50)]

        def call(i: int) -> None:
            with torch.inference_mode():
                offload_experts_forward(module, hidden, chosen[i % len(chosen)], weights)

        for i in range(CALLS):
            call(i)
        model.reset_stats()
        yield model, call


def test_no_page_is_touched_for_the_first_time(calls: tuple[OffloadedModel, Callable[[int], None]]) -> None:
    model, call = calls
    gc.collect()
    before = faults()
    for i in range(CALLS):
        call(i)
    touched = faults() - before
    stats = model.stats.tiers[model.stats.computing].counts
    assert stats.accesses == 3 * CALLS
    # A buffer of its own for every read, or for every product, would be thousands.
    assert touched < CALLS / 8, f"{touched} pages in {CALLS} calls"


def test_what_python_holds_does_not_grow(calls: tuple[OffloadedModel, Callable[[int], None]]) -> None:
    _, call = calls
    tracemalloc.start()
    try:
        for i in range(MANY_CALLS):
            call(i)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for i in range(MANY_CALLS):
            call(i)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 8 * MANY_CALLS, f"{after - before} bytes in {MANY_CALLS} calls"
