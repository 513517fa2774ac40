"""Layers divided between accelerator and CPU in a live model: the same bits whoever computes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from divided import EXPERTS, LAYERS, open_model, small_host
from logs import first_difference, twin

import offload.engine.hook
from offload.decide.schedulers.base import find_scheduler, scheduler_names
from offload.device.emulated import EmulatedDevice
from offload.engine.host import HostWorker
from offload.engine.outputs import Outputs

RULES = [name for name in scheduler_names() if find_scheduler(name).live]


@pytest.mark.parametrize("slots", [LAYERS * EXPERTS, 3, 0])
@pytest.mark.parametrize("rule", RULES)
def test_the_bits_are_those_of_the_resident_model(
    folder: Path, expected: Any, monkeypatch: pytest.MonkeyPatch, rule: str, slots: int
) -> None:
    small_host(monkeypatch, slots)
    ids, mask = tiny.ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        logits = expected(ids, attention_mask=mask).logits
    prompt = tiny.ids(1, 40, seed=3)
    wanted = expected.generate(prompt, max_new_tokens=30, do_sample=False, prefill_chunk_size=16)
    with open_model(folder, rule) as model:
        for _ in range(2):
            assert tiny.same_bits(model(ids, attention_mask=mask).logits, logits)
            assert torch.equal(
                model.generate(prompt, max_new_tokens=30, do_sample=False, prefill_chunk_size=16), wanted
            )
        stats = model.stats.as_dict()
        assert (stats["on_cpu"] > 0) == (rule != "gpu-only")
        model.parts.runtime.manager.check_integrity()


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "granitemoehybrid"])
def test_families_with_biases_and_shared_experts(tmp_path: Path, family: str) -> None:
    folder = tiny.save(tmp_path, family)
    resident = tiny.resident(folder)
    ids = tiny.ids(1, 12)
    wanted = resident.generate(ids, max_new_tokens=20, do_sample=False)
    with tiny.open_model(folder, device="emulated", scheduler="cpu-only") as model:
        slot = model.plan.slot_bytes
    with tiny.open_model(folder, device="emulated", scheduler="cpu-only", expert_cache=2 * slot) as model:
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), wanted)
        assert model.stats.as_dict()["on_cpu"] > 0


@pytest.mark.parametrize("rule", ["auto", "cpu-only", "dali"])
@pytest.mark.parametrize("slots", [LAYERS * EXPERTS, 4])
def test_a_live_run_is_decided_again(folder: Path, monkeypatch: pytest.MonkeyPatch, rule: str, slots: int) -> None:
    small_host(monkeypatch, slots)
    with open_model(folder, rule) as model:
        manager = model.parts.runtime.manager
        manager.log = log = []
        model.generate(tiny.ids(1, 9), max_new_tokens=15, do_sample=False)
        model.generate(tiny.ids(2, 20), max_new_tokens=5, do_sample=False)
        split = manager.split
        assert split is not None
        assert sum(len(decision.on_cpu) for decision in log) > 0
        assert first_difference(log, twin(manager, model.rules)) is None


def delayed(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Every worker dawdles: the readers, the link, the CPU's thread and the accelerator."""
    dice = random.Random(seed)

    def dawdle(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(dice.random() * 4e-4)
            return original(*args, **kwargs)

        return call

    from offload.store.plain import CheckpointReader

    monkeypatch.setattr(CheckpointReader, "read", dawdle(CheckpointReader.read))
    monkeypatch.setattr(EmulatedDevice, "copy", dawdle(EmulatedDevice.copy))
    monkeypatch.setattr(HostWorker, "_run", dawdle(HostWorker._run))
    monkeypatch.setattr(offload.engine.hook, "compute_expert", dawdle(offload.engine.hook.compute_expert))
    monkeypatch.setattr(Outputs, "compute", dawdle(Outputs.compute))


@pytest.mark.parametrize("rule", ["auto", "hybrimoe", "cpu-only"])
@pytest.mark.parametrize(
    ("runs", "tokens"), [(3, 24), pytest.param(20, 256, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_delays_change_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rule: str, runs: int, tokens: int
) -> None:
    small_host(monkeypatch, 6)
    prompt = tiny.ids(1, 11)
    found = []
    for seed in range(runs):
        with monkeypatch.context() as patch:
            delayed(patch, seed)
            with open_model(folder, rule, context=300) as model:
                generated = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        found.append(generated)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("slots", [LAYERS * EXPERTS, 5])
@pytest.mark.parametrize("rule", ["auto", "cpu-only"])
def test_prefetching_beside_a_divided_layer(
    folder: Path, expected: Any, monkeypatch: pytest.MonkeyPatch, rule: str, slots: int
) -> None:
    small_host(monkeypatch, slots)
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=60, min_new_tokens=60, do_sample=False)
    with open_model(folder, rule, gpu=6, predictor="cross-layer-gate", prefetch_depth=2) as model:
        prefetcher = model.parts.runtime.manager.prefetcher
        assert prefetcher is not None
        prefetcher.switch = None
        for _ in range(2):
            assert torch.equal(model.generate(prompt, max_new_tokens=60, min_new_tokens=60, do_sample=False), wanted)
        assert model.stats.as_dict()["on_cpu"] > 0
        model.parts.runtime.settle()
        model.parts.runtime.manager.check_integrity()


def test_schedulers_change_between_calls(folder: Path, expected: Any) -> None:
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=8, do_sample=False)
    with open_model(folder, "gpu-only") as model:
        for rule in ("gpu-only", "cpu-only", "auto", "gpu-only", "dali(serial=True)"):
            model.use_scheduler(rule)
            model.reset_stats()
            assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), wanted)
            if rule == "cpu-only":
                assert model.stats.as_dict()["on_cpu"] > 0
            if rule == "gpu-only":
                assert model.stats.as_dict()["on_cpu"] == 0
            assert model.rules.scheduler == rule
    with pytest.raises(RuntimeError, match="closed"):
        model.use_scheduler("auto")
