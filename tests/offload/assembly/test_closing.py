"""A model leaves nothing behind: closed, interrupted, or not even loaded."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from cache.errors import BudgetError, CheckpointError, NotMoEError
from offload.device.arena import HostRegion
from offload.system import cores


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_closing_restores_everything(checkpoint: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 3)
    before = torch.get_num_threads(), tiny.offload_threads(), Qwen3MoeExperts.__init__
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with tiny.open_model(checkpoint, device=device, threads=3, expert_cache=tiny.FEW) as model:
        assert torch.get_num_threads() == 3 and len(tiny.offload_threads()) > len(before[1])
        assert Qwen3MoeExperts.__init__ is before[2]
        inner = model.module
        experts = [module for module in inner.modules() if isinstance(module, Qwen3MoeExperts)]
        assert all("_offload_layer" in vars(module) for module in experts)
        model.generate(tiny.ids(1, 5), max_new_tokens=5)
    assert (torch.get_num_threads(), tiny.offload_threads(), Qwen3MoeExperts.__init__) == before
    assert affinity is None or os.sched_getaffinity(0) == affinity
    assert not any("_offload_layer" in vars(module) for module in experts)
    assert not inner._forward_hooks and not inner._forward_pre_hooks
    model.close()


def test_a_closed_model_says_so(checkpoint: Path) -> None:
    with tiny.open_model(checkpoint) as model:
        model.generate(tiny.ids(1, 5), max_new_tokens=5)
    for use in (
        lambda: model.generate(tiny.ids(1, 5), max_new_tokens=5),
        lambda: model(tiny.ids(1, 5)),
        lambda: model.config,
        lambda: model.generation_config,
        lambda: model.use_predictor("none"),
        lambda: model.use_prefill("kept"),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    assert model.stats.as_dict()["prefill_tokens"] == 5  # what it did can still be asked


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_closing_gives_the_experts_memory_back(checkpoint: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maps: list[weakref.ref[mmap.mmap]] = []
    build = HostRegion.__init__

    def watched(self: HostRegion, nbytes: int) -> None:
        build(self, nbytes)
        maps.append(weakref.ref(self._map))

    monkeypatch.setattr(HostRegion, "__init__", watched)
    model = tiny.open_model(checkpoint, device=device, expert_cache=tiny.FEW)
    model.generate(tiny.ids(1, 5), max_new_tokens=5)
    gc.collect()
    assert len([ref for ref in maps if ref() is not None]) >= 2
    model.close()
    gc.collect()
    assert [ref for ref in maps if ref() is not None] == []
    assert model.stats is not None


def test_a_load_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 3)
    tiny.save(tmp_path, "qwen3_moe")
    tiny.edit_tensors(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    before = torch.get_num_threads(), tiny.offload_threads(), Qwen3MoeExperts.__init__
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        tiny.open_model(tmp_path, device="emulated", threads=3)
    assert (torch.get_num_threads(), tiny.offload_threads(), Qwen3MoeExperts.__init__) == before


def test_errors_before_loading(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="too small"):
        tiny.open_model(checkpoint, cpu_mem="200M")
    with pytest.raises(BudgetError, match="--gpu-mem"):
        tiny.open_model(checkpoint, device="emulated", gpu_mem="100K")
    tiny.save(tmp_path, "qwen3_moe", mlp_only_layers=[0, 1, 2])
    with pytest.raises(NotMoEError):
        tiny.open_model(tmp_path)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_an_interrupt_midway(checkpoint: Path, resident: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C inside an expert: the cores are given back, nothing stays pinned, and the next reply is right."""
    import offload.engine.outputs

    compute, calls = offload.engine.outputs._linear_each, iter(range(10**9))
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None

    def interrupted(*args: Any) -> torch.Tensor:
        if next(calls) == 20:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(offload.engine.outputs, "_linear_each", interrupted)
    arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = resident.generate(tiny.ids(1, 10), **arguments)
    try:
        with tiny.open_model(checkpoint, device=device, expert_cache=tiny.FEW) as model:
            with pytest.raises(KeyboardInterrupt):
                model.generate(tiny.ids(1, 10), **arguments)
            model.parts.runtime.manager.check_integrity()
            assert affinity is None or os.sched_getaffinity(0) == affinity
            assert torch.equal(model.generate(tiny.ids(1, 10), **arguments), expected)
    finally:
        if affinity is not None:
            os.sched_setaffinity(0, affinity)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_ctrl_c_just_when_a_transfer_has_landed(
    checkpoint: Path, resident: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised there, the interrupt would lose the transfer, and whoever receives the rest would wait for it for ever."""
    with tiny.open_model(checkpoint, expert_cache=tiny.FEW, device=device) as model:
        landed = model.parts.runtime.engine._landed
        presses = 1

        class Pressed:
            put = landed.put
            get_nowait = landed.get_nowait

            def get(self) -> Any:
                nonlocal presses
                transfer = landed.get()
                if presses:
                    presses -= 1
                    signal.raise_signal(signal.SIGINT)
                return transfer

        monkeypatch.setattr(model.parts.runtime.engine, "_landed", Pressed())
        with pytest.raises(KeyboardInterrupt):
            model.generate(tiny.ids(1, 8), max_new_tokens=4, do_sample=False)
        model.parts.runtime.manager.check_integrity()
        arguments = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        ids = tiny.ids(1, 8)
        assert torch.equal(model.generate(ids, **arguments), resident.generate(ids, **arguments))
    assert not tiny.offload_threads()
