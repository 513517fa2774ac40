"""Routers whose product is our kernel's: the same but for rounding, and weights stay what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ids, open_model, save
from torch.nn import functional

from offload.formats.cpu import native
from offload.layers.router_products import RouterWeight

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")


def weight(dtype: torch.dtype = torch.bfloat16) -> RouterWeight:
    torch.manual_seed(0)
    made: Any = RouterWeight(torch.randn(60, 256).to(dtype), requires_grad=False)
    return made


@pytest.mark.parametrize("shape", [(256,), (1, 256), (7, 256), (2, 3, 256)])
def test_the_product_is_close_to_float64(shape: tuple[int, ...]) -> None:
    own = weight()
    x = torch.randn(shape).bfloat16()
    y = functional.linear(x, own)
    exact = x.double() @ own.data.double().t()
    assert type(y) is torch.Tensor and y.shape == (*shape[:-1], 60) and y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01 + 1e-4).all()


def test_a_row_has_the_bits_that_it_has_among_others() -> None:
    own, x = weight(), torch.randn(30, 256).bfloat16()
    assert torch.equal(functional.linear(x, own), torch.cat([functional.linear(row, own) for row in x.split(1)]))


def test_everything_else_is_torchs_own() -> None:
    own = weight()
    plain, x = own.data, torch.randn(3, 256)
    assert torch.equal(functional.linear(x, own.float()), functional.linear(x, plain.float()))
    assert type(own.float()) is type(own + 1) is type(own[2:]) is torch.Tensor
    bias = torch.randn(60).bfloat16()
    assert torch.equal(functional.linear(x.bfloat16(), own, bias), functional.linear(x.bfloat16(), plain, bias))
    assert own.shape == (60, 256) and own.dtype == torch.bfloat16 and isinstance(own, torch.nn.Parameter)


@pytest.mark.parametrize("exact", [True, False])
def test_models_that_need_not_be_exact_take_it(exact: bool, tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe")
    with open_model(tmp_path, exact=exact, dtype="bf16") as model:
        router = model.module.model.layers[0].mlp.gate
        assert (type(router.weight) is RouterWeight) != exact
        assert model.generate(ids(1, 5), max_new_tokens=3, do_sample=False).shape == (1, 8)
