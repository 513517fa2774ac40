"""Rows times plain matrices: the bits of `torch.mm`, whatever computes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offload.layers.rows import RowLinear, mv_is_exact, row_products, use_rows


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("n", "k"), [(96, 512), (70, 300), (33, 40)])
def test_every_row_has_the_bits_of_mm(n: int, k: int, shared: bool, transposed: bool, dtype: torch.dtype) -> None:
    weights = [random(*((k, n) if transposed else (n, k)), dtype=dtype, seed=i) for i in range(5)]
    x = random(1 if shared else 5, k, dtype=dtype)
    y = row_products(x, weights, transposed)
    for row, weight, got in zip(x.expand(5, k).split(1), weights, y.split(1), strict=True):
        assert torch.equal(got, torch.mm(row.clone(), weight if transposed else weight.t()))


@pytest.mark.parametrize("wrong", [1, 40])
def test_mv_is_not_used_where_one_sum_in_thousands_differs(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def mv(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        y = torch.mm(x[None], weight.t())[0]
        if len(calls) % wrong == 0:
            y[3] += 1
        return y

    mv_is_exact.cache_clear()
    monkeypatch.setattr(torch, "mv", mv)
    assert not mv_is_exact(torch.bfloat16, 1024, 256, torch.get_num_threads())
    mv_is_exact.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_that_takes_rows_gives_the_same_bits(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(320, 96, bias=False), nn.Linear(96, 320), nn.Linear(320, 40, bias=False)).to(dtype)
    x = random(1, 5, 320, dtype=dtype)
    with torch.no_grad():
        before = [model(x[:, i : i + 1]) for i in range(5)] + [model(x)]
        use_rows(model)
        assert [type(layer) for layer in model] == [RowLinear, nn.Linear, RowLinear]
        after = [model(x[:, i : i + 1]) for i in range(5)] + [model(x)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


def test_a_layer_whose_first_row_differs_keeps_its_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(320, 96, bias=False).bfloat16()
    rows = [random(1, 320, dtype=torch.bfloat16, seed=i) for i in range(3)]
    with torch.no_grad():
        wanted = [layer(row) for row in rows]
        use_rows(layer)
        monkeypatch.setattr("offload.layers.rows._verdicts", {})
        monkeypatch.setattr("offload.layers.rows.mv_is_exact", lambda *shape: True)
        monkeypatch.setattr(torch, "mv", lambda weight, x: torch.zeros(96, dtype=torch.bfloat16))
        assert all(torch.equal(layer(row), y) for row, y in zip(rows, wanted, strict=True))


def test_autocast_casts_a_linear_layer_that_takes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Sequential(nn.Linear(320, 96, bias=False)).bfloat16()
    x = random(1, 320, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        expected = layer(x)
    use_rows(layer)
    monkeypatch.setattr("offload.layers.rows.may_use_mv", lambda weight, x: True)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert expected.dtype is torch.float16
        assert torch.equal(layer(x), expected)
