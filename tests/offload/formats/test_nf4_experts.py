"""Experts computed whole by the NF4 kernel: what they give, and that it hangs on nothing beside them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from kernel_levels import kernels_of
from known_gates import GATES, biases_of, gated
from packed_nf4 import meaning, packed

from offload.formats import FORMATS, Fields, Gate
from offload.formats.cpu import native
from offload.formats.cpu.nf4_experts import Nf4Rows
from offload.formats.gate import SILU
from offload.formats.nf4 import code_int8, code_int16

NF4 = FORMATS["nf4"]
HIDDEN, INNER = 128, 192

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")


def some(n: int, k: int, seed: int) -> Fields:
    return packed(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5)


EXPERTS = [(some(2 * INNER, HIDDEN, 2 * i), some(HIDDEN, INNER, 2 * i + 1)) for i in range(4)]


def place(up: Fields, down: Fields, biases: Sequence[torch.Tensor] = ()) -> tuple[int, ...]:
    found = NF4.gated_place(up, down)
    assert found is not None
    return (*(each.data_ptr() for each in biases), *found) if biases else (0, 0, *found)


def inputs(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def alone(
    x: torch.Tensor, expert: int, levels: torch.Tensor, gate: Gate = SILU, biases: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Every row of x by itself."""
    y, where, first = torch.empty_like(x), [place(*EXPERTS[expert], biases)], torch.zeros(1, dtype=torch.long)
    for row, out in zip(x.split(1), y.split(1), strict=True):
        Nf4Rows(row, levels, 1, gate).compute(where, first, [(0, 1)], out)
    return y


def test_an_expert_is_what_its_matrices_mean(kernel_level: int) -> None:
    x = inputs(50)
    for expert, (up, down) in enumerate(EXPERTS):
        gate_up = x.double() @ meaning(up).t()
        gate, up_ = gate_up.chunk(2, dim=1)
        exact = (torch.nn.functional.silu(gate) * up_) @ meaning(down).t()
        y = alone(x, expert, code_int16())
        rounded = exact.bfloat16()
        assert (y.double() - exact).norm() <= 1.05 * (rounded.double() - exact).norm()
        assert (y.double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("gate", GATES)
def test_experts_with_biases_and_other_gates(gate: Gate, kernel_level: int) -> None:
    x = inputs(20)
    for expert, (up, down) in enumerate(EXPERTS):
        biases = biases_of(2 * INNER, HIDDEN)
        between = gated(x.double() @ meaning(up).t() + biases[0].double(), gate)
        exact = between @ meaning(down).t() + biases[1].double()
        y, rounded = alone(x, expert, code_int16(), gate, biases), exact.bfloat16()
        assert (y.double() - exact).norm() <= 1.05 * (rounded.double() - exact).norm()
        rows, together = Nf4Rows(x, code_int16(), 99, gate), torch.empty_like(y)
        rows.compute([place(up, down, biases)], torch.arange(20), [(0, 20)], together)
        assert torch.equal(together, y)


def test_gates_far_from_zero(kernel_level: int) -> None:
    x = inputs(8) * 200
    up, down = EXPERTS[0]
    gate, up_ = (x.double() @ meaning(up).t()).chunk(2, dim=1)
    assert gate.min() < -100 and gate.max() > 100
    exact = (torch.nn.functional.silu(gate) * up_) @ meaning(down).t()
    assert (alone(x, 0, code_int16()).double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("levels", [code_int16, code_int8])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_have_the_bits_that_they_have_alone(levels: object, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every level, on any number of threads, in any company, and each row where its token wants it."""
    assert callable(levels)
    tokens, top_k = 60, 2
    x = inputs(tokens)
    dice = torch.Generator().manual_seed(3)
    chosen = torch.stack([torch.randperm(4, generator=dice)[:top_k] for _ in range(tokens)])
    ids, order = torch.sort(chosen.reshape(-1), stable=True)
    spans = [(int((ids < e).sum()), int((ids <= e).sum())) for e in range(4)]
    found = []
    monkeypatch.setattr("offload.formats.cpu.threads.count", lambda: threads)
    for level in range(native.AVX2, native.level() + 1):
        with kernels_of(level):
            own = torch.stack([alone(x, e, levels()) for e in range(4)])
            expected = own[chosen, torch.arange(tokens)[:, None]].view(tokens * top_k, HIDDEN)
            rows = Nf4Rows(x, levels(), 99, SILU)
            together, each = torch.full_like(expected, torch.nan), torch.full_like(expected, torch.nan)
            rows.compute([place(*expert) for expert in EXPERTS], order, spans, together)
            for e in (2, 0, 3, 1):
                rows.compute([place(*EXPERTS[e])], order, [spans[e]], each)
            assert torch.equal(together, expected) and torch.equal(each, expected)
            found.append(expected)
    assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 0.0, 1e-38])
def test_inputs_may_be_anything(kernel_level: int, odd: float) -> None:
    x = torch.zeros(2, HIDDEN, dtype=torch.bfloat16)
    x[0, 3], x[1] = odd, 1
    y = alone(x, 0, code_int16())
    assert y[0].isnan().all() if abs(odd) > 1 or odd != odd else (y[0] == 0).all()
    assert y[1].isfinite().all()
