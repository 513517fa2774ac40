"""Experts at several precisions in live models, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from cache.errors import FormatError, PolicyError
from offload.model import OffloadedModel
from offload.options import PlanOptions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("mixed") / "model", "mixtral", torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLOAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def generated(model: OffloadedModel, steps: int = 24) -> torch.Tensor:
    output = model.generate(
        tiny.ids(2, 5), max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(output.logits)


@pytest.mark.parametrize("experts", ["bf16", "int8", "nf4", "int8>int4>int2", "int4", "int3", "int2"])
def test_where_experts_lie_makes_no_difference(checkpoint: Path, experts: str) -> None:
    """A quantised run is, bit for bit, the run of the same format with everything resident."""
    experts = "nested" if experts == "nested" else experts
    options: dict[str, Any] = {"experts": experts} | ({"fallback": "always_best:AlwaysBest"} if ">" in experts else {})
    with tiny.open_model(checkpoint, **options) as model:
        everything = generated(model)
        slot_bytes = sum(pool.slot_bytes for pool in model.plan.pools)
    for device in ("cpu", "emulated"):
        for slots in (0.5, 2, 5):
            with tiny.open_model(checkpoint, device=device, expert_cache=int(slots * slot_bytes), **options) as model:
                assert tiny.same_bits(generated(model), everything), (experts, device, slots)
                model.parts.runtime.manager.check_integrity()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_converted_at_the_models_own_precision_is_lossless(family: str, tmp_path: Path) -> None:
    """Records of bf16 give transformers' own bits, gates or none, transposed or not."""
    folder = tiny.save(tmp_path / family, family, torch.bfloat16)
    from offload.plan.conversion import convert_model

    convert_model(folder, PlanOptions(experts="bf16", expert_store=tmp_path / "store"))
    expected = tiny.resident(folder, torch.bfloat16)(tiny.ids(2, 9)).logits
    options = {"experts": "bf16", "expert_store": tmp_path / "store", "dtype": "bf16"}
    with tiny.open_model(folder, expert_cache="1K", **options) as model:
        assert type(model.parts.store.slices[0]).__name__ == "RecordSlice"
        assert tiny.same_bits(model(tiny.ids(2, 9)).logits, expected)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize(
    ("experts", "fallback"),
    [
        ("auto,nf4", "hobbit(t1=.3)"),
        ("int8>int4", "hobbit(t1=.3)"),
        ("int8>int4>int2", "deadline"),
        ("int4>int3>int2", "d2moe"),
        ("int4,int2", "fate(share=.5)"),
        ("auto,int4>int2", "hobbit(t1=.3, t2=.5, skip=True)"),
        ("auto,int8", "resident-low"),
        ("int8>int2", "resident-low"),
        ("auto,nf4", "adapmoe(threshold=.5)"),
        ("auto,nf4", "deadline"),
    ],
)
def test_fallbacks_live(checkpoint: Path, device: str, experts: str, fallback: str) -> None:
    """Every fallback, with caches too small for an event and larger: it answers, and says at which precision."""
    for share in (0.5, 4.0):
        with tiny.open_model(checkpoint, device=device, experts=experts, fallback=fallback) as model:
            cache = int(share * sum(pool.slot_bytes for pool in model.plan.pools))
        with tiny.open_model(
            checkpoint, device=device, experts=experts, fallback=fallback, expert_cache=cache
        ) as model:
            log = model.parts.runtime.manager.log = []
            assert generated(model).isfinite().all()
            model.parts.runtime.settle()
            stats = model.stats
            assert sum(stats.precision_uses.values()) == stats.tiers[stats.computing].counts.accesses
            assert sum(list(stats.precision_uses.values())[1:]) > 0, "nothing was degraded"
            for report in stats.tiers.values():
                assert report.peak_bytes <= report.capacity_bytes
            manager = model.parts.runtime.manager
            for caches in manager.stacks.by_slice:
                for each in caches:
                    each.check_integrity(idle=True)
            assert log


def test_a_fixed_choice_is_the_same_from_run_to_run(checkpoint: Path) -> None:
    options: dict[str, Any] = {"experts": "auto,nf4", "fallback": "hobbit(t1=.3)", "expert_cache": "20K"}
    runs = []
    for _ in range(2):
        with tiny.open_model(checkpoint, **options) as model:
            runs.append(generated(model))
    assert tiny.same_bits(*runs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"experts": "auto,nf4"}, PolicyError, "a --fallback chooses among them"),
        ({"experts": "nf4", "fallback": "hobbit"}, PolicyError, 'such as "auto,nf4"'),
        ({"experts": "int8", "fallback": "hobbit"}, PolicyError, 'such as "int8,nf4"'),
        ({"experts": "auto,bf16", "fallback": "hobbit"}, FormatError, "own precision is named twice"),
        ({"experts": "fp4"}, FormatError, "choose one of"),
        ({"experts": "auto,nf4", "fallback": "hobit"}, PolicyError, "choose one of"),
        ({"experts": "auto,nf4", "fallback": "edgemoe"}, PolicyError, "run `offload calibrate` first"),
    ],
)
def test_what_means_nothing_is_refused(
    checkpoint: Path, options: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny.open_model(checkpoint, **options)
