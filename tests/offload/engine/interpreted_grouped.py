"""The kernels of all experts of a layer at once, in Triton's interpreter; `test_grouped_triton` runs these tests."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import grouped_reference
import pytest
import tiny
import torch
from expert_slots import CLAMPED, KINDS, SILU, Experts, routing

from offload.engine.fused import kernels as grouped_triton
from offload.engine.fused.experts import FusedExperts

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def compute(
    kernels: ModuleType, experts: Experts, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """x [T, H], experts [T, K] and weights [T, K] -> [T, H], in the two launches."""
    places, slots = experts.places, experts.of(chosen)
    inner = torch.full((slots.numel(), places.down.k), float("nan"), dtype=x.dtype)
    out = torch.full_like(x, float("nan"))
    kernels.gate_up(x, slots, inner, experts.block, places)
    kernels.down(inner, slots, weights, torch.empty(1), out, experts.block, places, complete=True)
    return out


def inputs(tokens: int, hidden: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("hidden", "inner", "tokens", "top_k", "dtype", "clamped", "bias"),
    [
        (70, 34, 2, 3, torch.float32, False, False),
        pytest.param(192, 64, 1, 8, torch.float32, False, True, marks=pytest.mark.full),
        (96, 40, 1, 2, torch.bfloat16, True, True),
        (66, 130, 2, 1, torch.float32, True, False),
        (24, 8, 7, 4, torch.float16, False, False),
    ],
)
def test_they_compute_what_the_reference_does(
    kind: str, hidden: int, inner: int, tokens: int, top_k: int, dtype: torch.dtype, clamped: bool, bias: bool
) -> None:
    experts = Experts.random(kind, hidden, inner, 9, dtype, CLAMPED if clamped else SILU, bias=bias)
    x, (chosen, weights) = inputs(tokens, hidden, dtype), routing(tokens, top_k, 9)
    expected = compute(grouped_reference, experts, x, chosen, weights).float()
    found = compute(grouped_triton, experts, x, chosen, weights).float()
    assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_full_batch(kind: str) -> None:
    experts = Experts.random(kind, 40, 16, 12, torch.float32, SILU, bias=False)
    x, (chosen, weights) = inputs(32, 40), routing(32, 2, 12)
    expected = compute(grouped_reference, experts, x, chosen, weights)
    torch.testing.assert_close(compute(grouped_triton, experts, x, chosen, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_an_odd_number(kind: str) -> None:
    """A row may end within a byte of a nested plane; nf4 is not computed so, as a row would begin within one."""
    if kind == "nf4":
        pytest.skip("never asked for")
    experts = Experts.random(kind, 33, 7, 3, torch.float32, SILU, bias=True)
    x, (chosen, weights) = inputs(2, 33), routing(2, 2, 3)
    expected = compute(grouped_reference, experts, x, chosen, weights)
    torch.testing.assert_close(compute(grouped_triton, experts, x, chosen, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_slots_nor_other_tokens_change_a_bit(kind: str) -> None:
    experts = Experts.random(kind, 48, 24, 6, torch.bfloat16, SILU, bias=True)
    x, (chosen, weights) = inputs(2, 48, torch.bfloat16), routing(2, 2, 6)
    first = compute(grouped_triton, experts, x, chosen, weights)
    assert torch.equal(compute(grouped_triton, experts, x, chosen, weights), first)
    assert torch.equal(compute(grouped_triton, experts.moved(), x, chosen, weights), first)
    alone = [compute(grouped_triton, experts, x[t : t + 1], chosen[t : t + 1], weights[t : t + 1]) for t in range(2)]
    assert torch.equal(torch.cat(alone), first)


@pytest.mark.parametrize("kernels", [grouped_triton, grouped_reference], ids=["triton", "reference"])
@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_pairs_computed_in_several_calls_give_the_same_bits(kernels: ModuleType, kind: str) -> None:
    """As when some experts arrive later: from other blocks, some from outside, the last ones with the sum or before."""
    experts = Experts.random(kind, 48, 24, 6, torch.bfloat16, SILU, bias=True)
    elsewhere = experts.moved()
    x, (chosen, weights) = inputs(2, 48, torch.bfloat16), routing(2, 3, 6)
    expected = compute(kernels, experts, x, chosen, weights)
    places = experts.places
    for last in (True, False):
        inner, partial = torch.empty(6, 24, dtype=torch.bfloat16), torch.full((6, 48), float("nan"))
        out = torch.full_like(x, float("nan"))
        for source, members, complete in ((experts, (0, 1, 2), False), (elsewhere, (3, 4, 5), last)):
            slots = source.of(torch.where(torch.isin(chosen, torch.tensor(members)), chosen, -1))
            kernels.gate_up(x, slots, inner, source.block, places)
            kernels.down(inner, slots, weights, partial, out, source.block, places, complete=complete)
        if not last:
            assert bool(out.isnan().all())
            nobody = torch.full_like(chosen, -1, dtype=torch.int32)
            kernels.down(inner, nobody, weights, partial, out, experts.block, places, complete=True)
        assert torch.equal(out, expected)


def test_a_model_whose_experts_land_as_they_do(tmp_path: Path) -> None:
    """All experts resident or hardly any: the same bits, and close to what transformers says."""
    tiny.save(tmp_path, "gpt_oss", torch.bfloat16)
    ids, outputs = tiny.ids(1, 3), []
    for cache in (10**9, 3 * tiny.expert_map(tmp_path, torch.bfloat16).slot_bytes):
        options = {"prefill": "on-demand", "expert_cache": cache}
        with tiny.open_model(tmp_path, device="emulated", **options) as model:
            runtime = model.parts.runtime
            runtime.fused = FusedExperts(runtime, model.parts.device, model.parts.store, grouped_triton)
            outputs += [model(input_ids=ids).logits for _ in range(2)]
    assert all(torch.equal(outputs[0], each) for each in outputs[1:])
    expected = tiny.resident(tmp_path, torch.bfloat16)(input_ids=ids).logits
    torch.testing.assert_close(outputs[0], expected, rtol=0.1, atol=0.1)
