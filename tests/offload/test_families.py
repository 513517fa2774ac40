"""Offloaded runs equal resident ones bit for bit: every family, dtype, device and size of the expert cache.

`make test` runs eight families that use every flag of transformers' experts interface between them; the whole matrix is
marked `full`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, expert_sizes, families
from family_runs import CACHES, PROMPT, Run, Setup, cache_bytes, one_core, open_model

from cache.errors import UnsupportedFamilyError
from offload.model import OffloadedModel
from offload.options import PlanOptions
from offload.plan.prepare import make_plan
from offload.store.records import RecordSlice

_one_core = pytest.fixture(scope="module", autouse=True)(one_core)

EVERY_FLAG = {
    "gpt_oss": "transposed weights, biases, interleaved gate and up, a clamp, one tensor for all experts on disk",
    "nemotron_h": "no gate, Mamba layers, router weights in fp32, a correction bias",
    "muse_spark": "a norm after each expert, a router of another width, images and sound beside",
    "deepseek_v3": "groups of experts, shared experts, a dense first layer, compressed attention",
    "inkling2_text": "accumulation in fp32, capped gate and up, sliding windows",
    "granitemoehybrid": "fused tensors under other names, Mamba layers, shared experts",
    "qwen3_next": "linear attention, a gated shared expert, one tensor for each expert on disk",
    "mixtral": "the plain design, w1/w2/w3 on disk",
}
SHORT, LONG = 64, 256

QUICK = (
    Setup(torch.float32, "cpu", CACHES[0]),
    Setup(torch.bfloat16, "emulated", CACHES[0]),
    Setup(torch.bfloat16, "cpu", CACHES[1]),
    Setup(torch.float32, "emulated", CACHES[1]),
    Setup(torch.float32, "cpu", CACHES[3], ahead=True),
    Setup(torch.bfloat16, "emulated", CACHES[3], ahead=True),
)
WHOLE = tuple(
    Setup(dtype, device, cache)
    for dtype in (torch.float32, torch.bfloat16)
    for device in ("cpu", "emulated")
    for cache in CACHES
)
CONVERTED = (
    Setup(torch.float32, "cpu", CACHES[1], converted=True),
    Setup(torch.float32, "emulated", CACHES[3], converted=True),
    Setup(torch.bfloat16, "emulated", CACHES[1], converted=True),
    Setup(torch.bfloat16, "cpu", CACHES[3], ahead=True, converted=True),
)
AHEAD = tuple(setup._replace(ahead=True) for setup in WHOLE if setup.cache in CACHES[2:4])


def wrong_counts(setup: Setup, stats: dict[str, Any], experts: int) -> list[str]:
    """What the computing tier's counters say that a cache of this size cannot do."""
    tier = stats["tiers"]["gpu" if setup.device == "emulated" else "cpu"]
    expected = {
        CACHES[0]: tier["hits"] == tier["evictions"] == 0 < tier["bypasses"] == tier["misses"],
        CACHES[1]: tier["evictions"] > 0 and tier["bypasses"] > 0,
        CACHES[2]: tier["hits"] > 0 and tier["evictions"] > 0,
        CACHES[3]: tier["hits"] > 0 and tier["evictions"] > 0,
        CACHES[4]: tier["evictions"] == tier["bypasses"] == 0 < tier["misses"] <= experts < tier["hits"],
    }
    return [] if expected[setup.cache] else [f"counters do not fit the size of the cache: {tier}"]


def check(family: Family, setups: Sequence[Setup], steps: int, folder: Path) -> list[str]:
    """Every setup of one family against the resident model; what differs. Raises UnsupportedFamilyError."""
    found = []
    for dtype in dict.fromkeys(setup.dtype for setup in setups):
        checkpoint = folder / str(dtype)
        # One dtype in a single file, the other one in several shards.
        family.save(checkpoint, dtype, shard_size="5GB" if dtype == torch.float32 else "200KB")
        make_plan(checkpoint, PlanOptions(cpu_mem="8G", device="cpu", context=64))
        resident = family.resident(checkpoint, dtype)
        expected = Run.of(resident, steps)
        assert torch.isfinite(expected.logits).all(), f"{family.name} says nothing: its logits are not finite"
        for setup in setups:
            if setup.dtype == dtype:
                nbytes, context = cache_bytes(setup.cache, resident), 3 * (PROMPT + steps)
                with open_model(checkpoint, setup, nbytes, context) as model:
                    problems = expected.differences(Run.of(model, steps))
                    if not setup.converted:  # records are larger, and so fewer of them fit
                        problems += wrong_counts(setup, model.stats.as_dict(), len(expert_sizes(resident)))
                    elif not isinstance(model.parts.store.slices[0], RecordSlice):
                        problems.append("experts were not read from records")
                found += [f"{family.name}, {setup}: {problem}" for problem in problems]
    return found


def run_matrix(
    name: str, setups: Sequence[Setup], steps: int, folder: Path, record_property: Any, may_be_refused: bool
) -> None:
    """Checks one family and notes for the summary whether it was served or refused."""
    try:
        found = check(families()[name], setups, steps, folder)
    except UnsupportedFamilyError as error:
        assert may_be_refused, f"{name} follows the experts interface and must be served: {error}"
        assert name in str(error), f"the refusal does not name {name}: {error}"
        record_property("refused", f"{name}: {error}")
    else:
        assert not found, "\n".join(found)
        record_property("served", name)


@pytest.mark.parametrize("name", EVERY_FLAG)
def test_family_is_bit_identical(name: str, tmp_path: Path, record_property: Any) -> None:
    run_matrix(name, QUICK, SHORT, tmp_path, record_property, may_be_refused=False)


@pytest.mark.full
@pytest.mark.parametrize("name", families())
def test_family_is_bit_identical_in_every_setup(name: str, tmp_path: Path, record_property: Any) -> None:
    run_matrix(name, WHOLE, LONG, tmp_path, record_property, families()[name].may_be_refused)


@pytest.mark.full
@pytest.mark.parametrize("name", families())
def test_family_is_bit_identical_with_prefetching(name: str, tmp_path: Path, record_property: Any) -> None:
    run_matrix(name, AHEAD, LONG, tmp_path, record_property, families()[name].may_be_refused)


@pytest.mark.full
@pytest.mark.parametrize("name", families())
def test_family_is_bit_identical_from_a_converted_store(name: str, tmp_path: Path, record_property: Any) -> None:
    run_matrix(name, CONVERTED, LONG, tmp_path, record_property, families()[name].may_be_refused)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, family in families().items() if not family.may_be_refused])
def test_quantised_family_is_the_same_wherever_its_experts_are(name: str, tmp_path: Path) -> None:
    """At every format: a run from an accelerator's two slots is, bit for bit, that with everything in memory."""
    family = families()[name]
    family.save(tmp_path / "model", torch.bfloat16, shard_size="5GB")
    one = max(expert_sizes(family.resident(tmp_path / "model", torch.bfloat16)))
    common = {"cpu_mem": "8G", "context": 256, "threads": 1, "expert_store": tmp_path / "experts"}
    for experts in ("int8", "nf4", "int4", "int2"):
        with OffloadedModel.from_pretrained(tmp_path / "model", device="cpu", experts=experts, **common) as model:
            expected = Run.of(model, 32)
        assert torch.isfinite(expected.logits).all()
        accelerated = {"device": "emulated", "gpu_mem": "1G", "link": "500MB/s", "expert_cache": 2 * one + 4096}
        with OffloadedModel.from_pretrained(tmp_path / "model", experts=experts, **accelerated, **common) as model:
            assert not expected.differences(Run.of(model, 32)), (name, experts)


def test_forty_families_must_be_served() -> None:
    required = [family for family in families().values() if not family.may_be_refused]
    assert len(required) >= 40
    assert set(EVERY_FLAG) <= families().keys()
