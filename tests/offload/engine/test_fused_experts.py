"""A layer's experts computed together, on the emulated accelerator: the same bits whichever way a layer takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grouped_reference
import pytest
import tiny
import torch

from cache.errors import TransferError
from cache.types import ExpertKey, Phase
from offload.device.choose import make_device
from offload.device.emulated import EmulatedDevice
from offload.engine.fused.deferred import DeferredEvents, Routing
from offload.engine.fused.experts import MOST_TOKENS, FusedExperts, make_fused
from offload.model import OffloadedModel
from offload.store.plain import CheckpointReader

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

ALL = 10**9


@contextmanager
def opened(folder: Path, cache: int, **options: Any) -> Iterator[OffloadedModel]:
    """A model on the emulated accelerator, with the reference in place of kernels."""
    options = {"prefill": "on-demand", "expert_cache": cache} | options
    with tiny.open_model(folder, device="emulated", **options) as model:
        runtime = model.parts.runtime
        runtime.fused = FusedExperts(runtime, model.parts.device, model.parts.store, grouped_reference)
        runtime.manager.log = []
        yield model


def decisions(model: OffloadedModel) -> list[Any]:
    """What was decided, in order, without what depends on time."""
    return [(each.event, each.resident, each.fetches) for each in model.parts.runtime.manager.log or ()]


def warm(model: OffloadedModel, tokens: int = 24) -> None:
    """Bring as many experts in as fit."""
    for seed in range(6):
        model(input_ids=tiny.ids(1, tokens, seed=100 + seed))


def generated(model: OffloadedModel, rows: int = 2, new: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tiny.ids(rows, 5)
    tokens = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return model(input_ids=ids).logits, tokens


class Spy:
    """The order of things: "compute" of a layer's experts, "keep" and "tell" of deferred events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int]] = []
        gate_up, add, of = grouped_reference.gate_up, DeferredEvents.add, Routing.of

        def computed(*args: Any) -> None:
            self.seen.append(("compute", 0))
            gate_up(*args)

        def kept(events: DeferredEvents, layer: Any, *args: Any) -> None:
            self.seen.append(("keep", layer.index))
            add(events, layer, *args)

        def known(*args: Any) -> Routing:
            self.seen.append(("know", 0))
            return of(*args)

        monkeypatch.setattr(grouped_reference, "gate_up", computed)
        monkeypatch.setattr(DeferredEvents, "add", kept)
        monkeypatch.setattr(Routing, "of", known)

    def names(self) -> list[str]:
        return [name for name, _ in self.seen]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_changes_no_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """All resident, some, or none: in two launches, or as experts land; and close to what transformers says."""
    tiny.save(tmp_path, name, dtype)
    outputs = []
    for cache in (ALL, 6 * tiny.expert_map(tmp_path, dtype).slot_bytes, 1):
        with opened(tmp_path, cache) as model:
            warm(model)
            outputs.append(generated(model))
            assert (model.stats.as_dict()["bypasses"] > 0) == (cache < ALL)
            model.parts.runtime.manager.check_integrity()
    for logits, tokens in outputs[1:]:
        assert tiny.same_bits(logits, outputs[0][0])
        assert torch.equal(tokens, outputs[0][1])
    expected = tiny.resident(tmp_path, dtype)(input_ids=tiny.ids(2, 5)).logits
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(outputs[0][0], expected, rtol=tolerance, atol=tolerance)


def test_resident_layers_wait_for_nothing_and_are_told_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    with opened(tmp_path, ALL) as model:
        layers = len(model.parts.experts.layers)
        for layer in model.parts.experts.layers:  # every expert, whatever a prompt uses
            everything(model, layer)
        log = model.parts.runtime.manager.log = []
        spy = Spy(monkeypatch)
        model(input_ids=tiny.ids(1, 4))
        assert spy.names() == ["compute", "keep"] * layers + ["know"] * layers
        assert [each.event.layer for each in log] == list(range(layers))
        assert {each.event.phase for each in log} == {Phase.PREFILL}
        assert model.parts.runtime.phase is Phase.PREFILL
        model.generate(tiny.ids(1, 4), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        steps = [(each.event.sequence, each.event.step, each.event.layer) for each in log]
        assert steps == sorted(steps)
        assert len(set(steps)) == len(steps) == 5 * layers


def test_after_a_streamed_prompt_replies_wait_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    with opened(tmp_path, ALL) as model:
        expected = generated(model)
    with opened(tmp_path, ALL, prefill="streamed") as model:
        for layer in model.parts.experts.layers:
            everything(model, layer)
        spy = Spy(monkeypatch)
        found = generated(model)
        assert spy.names().count("keep") > 0
        model.parts.runtime.manager.check_integrity()
    assert tiny.same_bits(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_where_a_policy_exchanges_each_layer_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer needs may have gone for another expert by the time it is told."""
    tiny.save(tmp_path, "qwen3_moe")
    with opened(tmp_path, ALL, policy="dali") as model:
        for layer in model.parts.experts.layers:
            everything(model, layer)
        spy = Spy(monkeypatch)
        generated(model)
        assert spy.names() and "keep" not in spy.names()


def everything(model: OffloadedModel, layer: Any) -> None:
    """Use every expert of a layer once, as a prompt might."""
    count = layer.num_experts
    for _ in model.parts.runtime.run(layer, list(range(count)), [1.0] * count, [1] * count):
        pass


def test_deferring_changes_no_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers are resident as a whole, others never: the manager hears the same, in the same order."""
    tiny.save(tmp_path, "qwen3_moe")
    logs, outputs, seen = [], [], []
    for defers in (True, False):
        with monkeypatch.context() as patch:
            spy = Spy(patch)
            if not defers:
                patch.setattr(FusedExperts, "_may_defer", lambda self: False)
            slot = tiny.expert_map(tmp_path).slot_bytes
            experts = tiny.expert_map(tmp_path).layers[0].num_experts
            with opened(tmp_path, (experts + experts // 2) * slot) as model:
                model.use_predictor("none")
                everything(model, model.parts.experts.layers[0])
                outputs.append(generated(model))
                logs.append(decisions(model))
                model.parts.runtime.manager.check_integrity()
            seen.append(spy.names().count("keep"))
    assert seen[0] > 0 == seen[1]
    assert logs[0] == logs[1]
    assert tiny.same_bits(outputs[0][0], outputs[1][0])


def test_experts_that_land_later_take_launches_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    with opened(tmp_path, ALL) as model:
        spy = Spy(monkeypatch)
        for _ in range(2):
            model(input_ids=tiny.ids(1, 1))
        layers, top_k = len(model.parts.experts.layers), model.config.num_experts_per_tok
        cold = ["know"] + ["compute"] * top_k
        assert spy.names() == cold * layers + ["know", "compute"] * layers


def test_what_it_leaves_to_others_comes_after_all_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    with opened(tmp_path, ALL) as model:
        for layer in model.parts.experts.layers:
            everything(model, layer)
        spy = Spy(monkeypatch)
        log = model.parts.runtime.manager.log = []
        model(input_ids=tiny.ids(1, MOST_TOKENS + 1))
        assert spy.names() == []
        fused, layer = model.parts.runtime.fused, model.parts.experts.layers[1]
        monkeypatch.setitem(fused._places, 1, None)  # type: ignore[union-attr]
        log.clear()
        model(input_ids=tiny.ids(1, 3))
        assert spy.names()[:3] == ["compute", "keep", "know"]
        assert [each.event.layer for each in log] == list(range(len(model.parts.experts.layers)))
        assert layer.index == 1


def test_an_observer_sees_every_expert(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    seen = []
    with opened(tmp_path, ALL) as model:
        model.parts.runtime.observer = lambda layer, expert, *rest: seen.append((layer, expert))
        model(input_ids=tiny.ids(1, 2))
    assert len({layer for layer, _ in seen}) > 1


@pytest.mark.parametrize("rule", ["cpu-only", "hybrimoe"])
def test_beside_the_cpu(rule: str, tmp_path: Path) -> None:
    """What the CPU computes of a layer, with products of its own, is added in its place."""
    tiny.save(tmp_path, "qwen3_moe")
    expected = tiny.resident(tmp_path)(input_ids=tiny.ids(2, 5)).logits
    with opened(tmp_path, 100_000, scheduler=rule, cpu_mem="8G") as model:
        warm(model, 8)
        logits = [model(input_ids=tiny.ids(2, 5)).logits for _ in range(3)]
        assert any(each.on_cpu for each in model.parts.runtime.manager.log or ())
    for each in logits:
        torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-3)


def test_an_expert_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path, "qwen3_moe")
    read = CheckpointReader.read
    with opened(tmp_path, ALL) as model:
        model(input_ids=tiny.ids(1, 3))
        before = model(input_ids=tiny.ids(1, 12, seed=3)).logits

    def broken(reader: CheckpointReader, key: ExpertKey, *args: Any) -> int:
        if key.layer == 1:
            raise TransferError("the disk is gone")
        return read(reader, key, *args)

    with opened(tmp_path, ALL) as model:
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointReader, "read", broken)
            with pytest.raises(TransferError, match="the disk is gone"):
                model(input_ids=tiny.ids(1, 12, seed=3))
            model.parts.runtime.manager.check_integrity()
        assert tiny.same_bits(model(input_ids=tiny.ids(1, 12, seed=3)).logits, before)


def test_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself only on a CUDA GPU: elsewhere the bits are those of experts computed one by one."""
    tiny.save(tmp_path, "qwen3_moe")
    with tiny.open_model(tmp_path, device="emulated") as model:
        assert model.parts.runtime.fused is None
        assert make_fused(model.parts.runtime, model.parts.device, model.parts.store) is None


def test_small_tensors_cross_by_themselves() -> None:
    device = make_device("emulated", "1MB/s")
    assert isinstance(device, EmulatedDevice)
    there = device.send(torch.arange(3))
    later = device.read_later(there)
    there += 1
    assert later().tolist() == [0, 1, 2]


# On hardware.


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
def test_on_cuda_a_resident_layer_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises at whatever waits for the device while the layer is given to it."""
    pytest.importorskip("triton")
    tiny.save(tmp_path, "qwen3_moe", torch.bfloat16)
    ids, call = tiny.ids(2, 5).cuda(), FusedExperts.__call__

    def strict(fused: FusedExperts, *args: Any) -> torch.Tensor | None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(fused, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    options: dict[str, Any] = {"gpu_mem": "2G", "expert_cache": ALL, "prefill": "on-demand"}
    with tiny.open_model(tmp_path, device="cuda", **options) as model:
        cold = model(input_ids=ids).logits
        for layer in model.parts.experts.layers:
            everything(model, layer)
        model(input_ids=ids)  # makes the tables
        monkeypatch.setattr(FusedExperts, "__call__", strict)
        spy = Spy(monkeypatch)
        assert tiny.same_bits(model(input_ids=ids).logits, cold)
        layers = len(model.parts.experts.layers)
        assert spy.names() == ["keep"] * layers + ["know"] * layers
