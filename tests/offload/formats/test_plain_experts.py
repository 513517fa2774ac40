"""Experts of plain matrices computed whole: what they give, and that it hangs on nothing beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from known_gates import GATES, biases_of, gated
from tiny import ids, open_model, same_bits, save

from offload.formats import Gate
from offload.formats.cpu import native, plain_experts
from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.plain_experts import PlainRows, place, serves
from offload.formats.gate import SILU

HIDDEN, INNER, EXPERTS = 96, 160, 5
SIZES = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32}
SLOT = 3 * 64 * 32 * 2
"""Bytes of an expert of these sizes."""

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")


def matrices(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(expert)
    up = torch.randn(2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5
    return up.bfloat16(), (torch.randn(HIDDEN, INNER, generator=generator) / INNER**0.5).bfloat16()


ALL = [matrices(expert) for expert in range(EXPERTS)]


def inputs(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def alone(x: torch.Tensor, expert: int, gate: Gate = SILU, biases: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """Every row of x by itself."""
    y, where, first = torch.empty_like(x), [(*biases, *place(*ALL[expert]))], torch.zeros(1, dtype=torch.long)
    for row, out in zip(x.split(1), y.split(1), strict=True):
        PlainRows(row, 1, gate).compute(where, first, [(0, 1)], out)
    return y


def test_an_expert_is_what_its_matrices_mean(kernel_level: int) -> None:
    x = inputs(50)
    for expert, (up, down) in enumerate(ALL):
        gate, up_ = (x.double() @ up.double().t()).chunk(2, dim=1)
        exact = (torch.nn.functional.silu(gate) * up_) @ down.double().t()
        y, rounded = alone(x, expert), exact.bfloat16()
        assert (y.double() - exact).norm() <= 1.001 * (rounded.double() - exact).norm()


@pytest.mark.parametrize("gate", GATES)
def test_experts_with_biases_and_other_gates(gate: Gate, kernel_level: int) -> None:
    x = inputs(20)
    for expert, (up, down) in enumerate(ALL):
        biases = biases_of(2 * INNER, HIDDEN)
        between = gated(x.double() @ up.double().t() + biases[0].double(), gate)
        exact = between @ down.double().t() + biases[1].double()
        y, rounded = alone(x, expert, gate, (biases[0].data_ptr(), biases[1].data_ptr())), exact.bfloat16()
        assert (y.double() - exact).norm() <= 1.001 * (rounded.double() - exact).norm()


@pytest.mark.parametrize("most", [10**9, 70, 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_have_the_bits_that_they_have_alone(
    threads: int, most: int, kernel_level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every level, on any number of threads, in any company, and each row where its token wants it."""
    monkeypatch.setattr(own_threads, "count", lambda: threads)
    monkeypatch.setattr(plain_experts, "ROOM", most * (HIDDEN + INNER + 32))
    tokens, top_k = 120, 3
    x = inputs(tokens)
    chosen = torch.stack([torch.randperm(EXPERTS)[:top_k] for _ in range(tokens)])
    chosen[:100, 0] = 0  # more rows than the kernel takes at a time
    chosen[:100, 1:] = torch.randint(1, EXPERTS, (100, top_k - 1))
    values, order = chosen.reshape(-1).sort(stable=True)
    ends = torch.bincount(values, minlength=EXPERTS).cumsum(0).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    y = torch.full((tokens * top_k, HIDDEN), float("nan"), dtype=torch.bfloat16)
    PlainRows(x, 10**9, SILU).compute([(0, 0, *place(*each)) for each in ALL], order, spans, y)
    for expert, (start, end) in enumerate(spans):
        rows = order[start:end]
        assert same_bits(y[rows], alone(x[rows // top_k], expert))


def test_what_it_does_not_take() -> None:
    up, down = ALL[0]
    assert serves(up, down)
    assert not serves(up.half(), down.half()) and not serves(up[:, :80], down[:80])
    assert not serves(up.t().contiguous().t(), down) and not serves(up.to("meta"), down.to("meta"))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_budgets_change_no_bit(family: str, tmp_path: Path, kernel_level: int) -> None:
    """Where experts lie, and when they come, decides which are computed together."""
    save(tmp_path, family, **SIZES)
    calls: list[int] = []
    compute, found = PlainRows.compute, []

    def counted(self: PlainRows, *args: Any) -> None:
        calls.append(len(args[0]))
        compute(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainRows, "compute", counted)
        for budget in (None, 2.5, 4.5):
            options = {} if budget is None else {"expert_cache": int(budget * SLOT)}
            with open_model(tmp_path, exact=False, dtype="bf16", **options) as model, torch.no_grad():
                logits = [model(ids(1, 9)).logits, model(ids(1, 40)).logits, model(ids(1, 1)).logits]
                found.append(torch.cat([each.flatten() for each in logits]))
    assert calls and max(calls) > 1
    assert all(same_bits(each, found[0]) for each in found)
