"""What experts give is put where tokens want it, whatever their routing and their precisions are like."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from offload.engine.outputs import Outputs, compute_expert
from offload.store.base import Weights

HIDDEN, INNER = 32, 64


def module() -> Any:
    def apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}
    return SimpleNamespace(**flags, _apply_gate=apply_gate)


def expert(seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    dice = torch.Generator().manual_seed(seed)
    up = torch.randn(2 * INNER, HIDDEN, generator=dice).to(dtype)
    return {"gate_up_proj": up, "down_proj": torch.randn(HIDDEN, INNER, generator=dice).to(dtype)}


def test_a_token_that_goes_to_one_expert_twice() -> None:
    hidden = torch.randn(1, HIDDEN, dtype=torch.float64)  # two rows of a product differ from one in the last bits
    order, weights = torch.tensor([1, 0, 2]), torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    experts = {3: expert(3, torch.float64), 7: expert(7, torch.float64)}
    outputs = Outputs(module(), hidden, 3, order, {3: (0, 1), 7: (1, 3)})
    outputs.compute(list(experts.items()))
    once, twice = (compute_expert(module(), hidden, each) for each in experts.values())
    torch.testing.assert_close(outputs.sum(weights), 0.5 * once + 0.5 * twice)


def test_precisions_that_give_other_dtypes_come_together() -> None:
    hidden, weights = torch.randn(1, HIDDEN), torch.tensor([[0.4, 0.6]])
    high, low = expert(1), expert(2, torch.bfloat16)
    outputs = Outputs(module(), hidden, 2, torch.arange(2), {1: (0, 1), 2: (1, 2)})
    outputs.compute([(1, high)])
    outputs.compute([(2, low)])
    expected = 0.4 * compute_expert(module(), hidden, high) + 0.6 * compute_expert(module(), hidden, low).float()
    y = outputs.sum(weights)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected)


def test_what_nobody_computed_counts_as_nothing() -> None:
    hidden, weights = torch.randn(2, HIDDEN), torch.tensor([[0.4, 0.6], [0.1, 0.9]])
    order, spans = torch.tensor([0, 2, 1, 3]), {5: (0, 2), 6: (2, 4)}
    outputs = Outputs(module(), hidden, 2, order, spans)
    assert torch.equal(outputs.sum(weights), torch.zeros(2, HIDDEN)) and outputs.missing == {5, 6}
    outputs.compute([(6, expert(6))])
    assert outputs.missing == {5}
    assert torch.equal(outputs.sum(weights), weights[:, 1:] * compute_expert(module(), hidden, expert(6)))
