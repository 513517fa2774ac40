"""Budgets become bytes per tier: nothing above a budget, and a refusal that says what would do."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import BudgetError, ContextError, DeviceError
from cache.types import Tier
from offload.options import PlanOptions
from offload.plan.budgets import (
    DEFAULT_CONTEXT,
    MIB,
    WORKSPACE_SHARE,
    Budgets,
    Plan,
    choose_context,
    place,
)
from offload.plan.needs import GROWTH_BYTES, Needs, SliceNeeds
from offload.plan.prepare import make_plan
from offload.system.sizes import parse_bytes

NEEDS = Needs(
    model="m",
    context=4096,
    max_context=32768,
    dense_bytes=200 * MIB,
    kv_bytes=50 * MIB,
    workspace_bytes={2048: 80 * MIB, 512: 20 * MIB, 16: 1 * MIB},
    layers=4,
    experts=64,
    slices=(SliceNeeds("bf16", 3 * MIB),),
    expert_bytes=64 * 3 * MIB,
    reader_bytes=5 * MIB,
    readers=2,
    places=2,
    process_bytes=300 * MIB,
)
HOST = 300 * MIB + GROWTH_BYTES + 2 * (5 + 3) * MIB  # the process, and two reads at once


def plan_of(budgets: Budgets, needs: Needs = NEEDS) -> Plan:
    return place(needs, budgets, device="x", dtype="bfloat16")


def used(plan: Plan, tier: Tier) -> int:
    return sum(item.nbytes for item in plan.items if item.tier is tier)


def test_everything_on_the_cpu() -> None:
    plan = plan_of(Budgets(cpu=800 * MIB))
    # 5% of 800 MiB are 40: a pass of 512 tokens takes 19 more than the shortest, and fits, one of 2048 does not.
    fixed = HOST + (200 + 50 + 20) * MIB
    assert plan.chunk == 512 and plan.computing_tier is Tier.CPU
    assert plan.cache_bytes == {Tier.CPU: (800 * MIB - fixed) // (3 * MIB) * 3 * MIB}
    assert plan.slots(Tier.CPU) == plan.cache_bytes[Tier.CPU] // (3 * MIB) == 39
    assert plan.slots(Tier.GPU) == 0
    assert 800 * MIB - 3 * MIB < used(plan, Tier.CPU) <= 800 * MIB
    assert used(plan, Tier.DISK) == 64 * 3 * MIB


def test_an_accelerator_takes_the_dense_part() -> None:
    plan = plan_of(Budgets(cpu=500 * MIB, gpu=400 * MIB))
    assert plan.chunk == 512 and plan.computing_tier is Tier.GPU
    assert plan.cache_bytes == {
        Tier.GPU: (400 - 200 - 50 - 20 - 2 * 3) // 3 * 3 * MIB,
        Tier.CPU: (500 * MIB - HOST) // (3 * MIB) * 3 * MIB,
    }
    lines = {(what, tier): nbytes for what, tier, nbytes, _ in plan.rows()}
    assert lines["dense weights", "gpu"] == 200 * MIB and lines["process", "cpu"] == 300 * MIB + GROWTH_BYTES
    assert lines["staging", "gpu"] == 6 * MIB and lines["transfer buffers", "cpu"] == 16 * MIB


def test_no_cache_is_larger_than_all_experts() -> None:
    plan = plan_of(Budgets(cpu=99 * 2**30, gpu=99 * 2**30))
    assert plan.slots(Tier.GPU) == plan.slots(Tier.CPU) == 64 and plan.chunk == 2048


def test_expert_cache_caps_the_computing_tier_only() -> None:
    plan = plan_of(Budgets(cpu=900 * MIB, gpu=900 * MIB, expert_cache=10 * MIB))
    assert plan.cache_bytes[Tier.GPU] == 9 * MIB and plan.slots(Tier.CPU) == 64
    assert plan_of(Budgets(cpu=900 * MIB, expert_cache=10 * MIB)).cache_bytes == {Tier.CPU: 9 * MIB}
    assert plan_of(Budgets(cpu=900 * MIB, expert_cache=1)).cache_bytes == {Tier.CPU: 0}
    # It asks for no more than the budget has.
    assert plan_of(Budgets(cpu=700 * MIB, expert_cache=900 * MIB)) == plan_of(Budgets(cpu=700 * MIB))


def test_longer_passes_never_for_less_memory() -> None:
    least = HOST // MIB + 200 + 50 + 1  # with the shortest pass
    chunks = [plan_of(Budgets(cpu=mib * MIB)).chunk for mib in range(least, 2400)]
    assert chunks == sorted(chunks) and set(chunks) == {16, 512, 2048}


def test_a_plan_is_plain_json() -> None:
    plan = plan_of(Budgets(cpu=800 * MIB, gpu=700 * MIB))
    told = json.loads(json.dumps(plan.as_dict()))
    assert told["cache_bytes"] == {"gpu": plan.cache_bytes[Tier.GPU], "cpu": plan.cache_bytes[Tier.CPU]}
    assert sum(item["bytes"] for item in told["items"] if item["tier"] == "gpu") == used(plan, Tier.GPU)
    assert told["context"] == 4096 and told["gpu_mem_bytes"] == 700 * MIB


def test_a_refusal_has_the_numbers() -> None:
    with pytest.raises(BudgetError) as refusal:
        plan_of(Budgets(cpu=500 * MIB))
    message = str(refusal.value)
    for part in (
        "--cpu-mem 500.0 MiB",
        "dense weights 200.0 MiB",
        "KV cache 50.0 MiB",
        "process 396.0 MiB",
        "--context",
    ):
        assert part in message
    with pytest.raises(BudgetError, match=r"--gpu-mem 100\.0 MiB is too small.*smallest that works is --gpu-mem 272M"):
        plan_of(Budgets(cpu=2000 * MIB, gpu=100 * MIB))
    with pytest.raises(BudgetError) as refusal:
        plan_of(Budgets(cpu=100 * MIB, gpu=2000 * MIB))
    assert f"--cpu-mem {-(-HOST // (16 * MIB)) * 16}M" in str(refusal.value) and "--context" not in str(refusal.value)


sizes = st.integers(1, 500 * MIB)


@st.composite
def slices(draw: st.DrawFn) -> tuple[SliceNeeds, ...]:
    """One slice, or several that share the memory; the last may have to be whole."""
    count = draw(st.integers(1, 3))
    whole = count > 1 and draw(st.booleans())
    return tuple(
        SliceNeeds(f"slice {i}", 64 * draw(st.integers(1, 10**6)), 1 / count, whole and i == count - 1)
        for i in range(count)
    )


@st.composite
def needs(draw: st.DrawFn) -> Needs:
    chunks = sorted(draw(st.lists(st.integers(1, 4096), min_size=1, max_size=5, unique=True)), reverse=True)
    weights = sorted(draw(st.lists(sizes, min_size=len(chunks), max_size=len(chunks))), reverse=True)
    return dataclasses.replace(
        NEEDS,
        dense_bytes=draw(sizes),
        kv_bytes=draw(st.integers(0, 500 * MIB)),
        workspace_bytes=dict(zip(chunks, weights, strict=True)),
        experts=draw(st.integers(1, 5000)),
        slices=draw(slices()),
        reader_bytes=draw(sizes),
        process_bytes=draw(sizes),
    )


@settings(max_examples=150, deadline=None)
@given(needs=needs(), cpu=st.integers(1, 4000 * MIB), gpu=st.none() | st.integers(1, 4000 * MIB), cap=st.none() | sizes)
def test_no_plan_exceeds_a_budget_and_what_a_refusal_names_works(
    needs: Needs, cpu: int, gpu: int | None, cap: int | None
) -> None:
    refused: dict[str, int] = {}
    while True:
        try:
            plan = plan_of(Budgets(cpu, gpu, cap), needs)
        except BudgetError as error:
            flag, size = re.search(r"smallest that works is --(cpu|gpu)-mem (\w+)", str(error)).groups()  # type: ignore[union-attr]
            assert flag not in refused, f"{flag}: {refused[flag]} was said to work"
            refused[flag] = parse_bytes(size)
            if flag == "cpu":
                assert refused["cpu"] > cpu  # less than what works was refused
                cpu = refused["cpu"]
            else:
                assert gpu is not None and refused["gpu"] > gpu
                gpu = refused["gpu"]
        else:
            break
    assert used(plan, Tier.CPU) <= cpu
    assert gpu is None or used(plan, Tier.GPU) <= gpu
    whole = sum(needs.experts * each.slot_bytes for each in needs.slices if each.whole)
    for tier, nbytes in plan.cache_bytes.items():
        assert nbytes == sum(plan.slots(tier, i) * each.slot_bytes for i, each in enumerate(needs.slices))
        assert all(0 <= plan.slots(tier, i) <= needs.experts for i in range(len(needs.slices)))
    for i, each in enumerate(needs.slices):
        assert not each.whole or plan.slots(Tier.CPU, i) == needs.experts
    assert cap is None or plan.cache_bytes[plan.computing_tier] <= cap + (whole if gpu is None else 0)
    computing = cpu if gpu is None else gpu
    smallest = min(needs.workspace_bytes)
    beyond = needs.workspace_bytes[plan.chunk] - needs.workspace_bytes[smallest]
    assert beyond <= WORKSPACE_SHARE * computing


@settings(max_examples=100, deadline=None)
@given(needs=needs(), cpu=st.integers(1, 4000 * MIB), gpu=st.none() | st.integers(1, 4000 * MIB))
def test_more_memory_never_refuses_what_less_allowed(needs: Needs, cpu: int, gpu: int | None) -> None:
    try:
        plan_of(Budgets(cpu, gpu), needs)
    except BudgetError:
        return
    for more in (1, 10 * MIB, 300 * MIB, 3000 * MIB):
        plan_of(Budgets(cpu + more, None if gpu is None else gpu + more), needs)


def test_the_context_to_plan_for() -> None:
    assert choose_context(None, None) == choose_context(None, 10**6) == DEFAULT_CONTEXT
    assert choose_context(None, 100) == choose_context(100, 100) == choose_context(100, None) == 100
    for context, limit in ((101, 100), (0, 100), (-5, None)):
        with pytest.raises(ContextError, match=f"--context {context}"):
            choose_context(context, limit)


# From a checkpoint's headers.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("placement"), "qwen3_moe")


def test_a_plan_is_made_from_headers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.store.files.FileReader.read", None)  # whoever reads weights fails
    plan = make_plan(checkpoint, PlanOptions(cpu_mem="4G", context=64, expert_cache="100K", device="cpu"))
    assert (plan.context, plan.cpu_mem_bytes, plan.gpu_mem_bytes, plan.dtype) == (64, 4 * 2**30, None, "float32")
    assert (plan.layers, plan.experts, plan.slot_bytes) == (3, 24, 3 * 64 * 32 * 4)
    assert plan.slots(Tier.CPU) == 100 * 1024 // plan.slot_bytes == 4
    assert plan.download_bytes == 0 and plan.notes == ()
    halved = make_plan(checkpoint, PlanOptions(cpu_mem="4G", context=64, device="cpu", dtype="bf16"))
    assert halved.dtype == "bfloat16" and halved.slot_bytes == plan.slot_bytes // 2


def test_without_budgets_most_of_what_is_free_is_taken(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.system.memory.available_bytes", lambda: 8 * 2**30)
    monkeypatch.setattr("offload.system.memory.resident_bytes", lambda: 2**30)
    assert make_plan(checkpoint, PlanOptions(device="cpu")).cpu_mem_bytes == 2**30 + int(0.9 * 8 * 2**30)
    both = make_plan(checkpoint, PlanOptions(device="emulated"))
    assert both.gpu_mem_bytes is not None
    assert both.cpu_mem_bytes > 0 and both.cpu_mem_bytes + both.gpu_mem_bytes <= 2**30 + 0.9 * 8 * 2**30 + 2**33


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cpu_mem": "100M"}, BudgetError, "--cpu-mem 100.0 MiB is too small"),
    ({"cpu_mem": "lots"}, BudgetError, '--cpu-mem: cannot read "lots"'),
    ({"cpu_mem": -1}, BudgetError, "--cpu-mem"),
    ({"gpu_mem": "0"}, BudgetError, "--gpu-mem"),
    ({"expert_cache": ""}, BudgetError, "--expert-cache"),
    ({"context": 10**9}, ContextError, "at most 2048"),
    ({"context": 0}, ContextError, "--context 0"),
    ({"device": "toaster"}, DeviceError, "toaster"),
    ({"link": "1GB/s"}, DeviceError, "--link"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_what_cannot_be_planned(
    checkpoint: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as refusal:
        make_plan(checkpoint, PlanOptions(**({"device": "cpu", "cpu_mem": "4G"} | arguments)))
    assert "\n" not in str(refusal.value)
