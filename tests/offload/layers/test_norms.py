"""RMSNorm in one call: which classes take it, and that it is the same but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import open_model, save
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from offload.formats.cpu import native
from offload.layers.norms import use_norms

with_kernels = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")


def norm(cls: Any, n: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """One as it is, and one with our kernel."""
    torch.manual_seed(n)
    plain = cls(n).to(dtype)
    nn.init.uniform_(plain.weight, 0.5, 2)
    ours = cls(n).to(dtype)
    ours.load_state_dict(plain.state_dict())
    model = nn.ModuleList([ours])
    use_norms(model)
    return plain, ours


@with_kernels
@torch.no_grad()
@pytest.mark.parametrize("cls", [Qwen3MoeRMSNorm, GptOssRMSNorm])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 3, 128), (1, 700, 2048), (1, 5, 4, 8)])
def test_it_is_the_same_but_for_rounding(cls: Any, shape: tuple[int, ...]) -> None:
    plain, ours = norm(cls, shape[-1], torch.bfloat16)
    assert type(ours) is not cls and isinstance(ours, cls) and type(ours).__name__ == cls.__name__
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16() * 30
    expected, y = plain(x), ours(x)
    assert y.shape == expected.shape and y.dtype == torch.bfloat16
    # Sums differ in the last bits of float32, so a rounding to bfloat16 differs rarely, and by one step or two.
    assert (y != expected).float().mean() < 2e-3
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=0)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * plain.weight.double()
    assert (y.double() - exact).norm() <= 1.02 * (expected.double() - exact).norm()
    assert torch.equal(ours(x.transpose(0, 1)), y.transpose(0, 1))


@with_kernels
@torch.no_grad()
def test_what_is_no_number_stays_none() -> None:
    plain, ours = norm(Qwen3MoeRMSNorm, 64, torch.bfloat16)
    x = torch.ones(3, 64, dtype=torch.bfloat16)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    torch.testing.assert_close(ours(x), plain(x), equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize(("n", "dtype"), [(64, torch.float32), (64, torch.float16), (60, torch.bfloat16)])
def test_what_the_kernel_does_not_take_is_computed_as_before(n: int, dtype: torch.dtype) -> None:
    plain, ours = norm(Qwen3MoeRMSNorm, n, dtype)
    x = torch.randn(2, n).to(dtype)
    assert torch.equal(ours(x), plain(x))


def test_classes_that_do_something_else_stay_as_they_are() -> None:
    plain = Gemma3RMSNorm(64)
    use_norms(nn.ModuleList([plain]))
    assert type(plain) is Gemma3RMSNorm


def test_its_own_class_is_not_taken_twice() -> None:
    _, ours = norm(Qwen3MoeRMSNorm, 64, torch.bfloat16)
    before = type(ours)
    use_norms(nn.ModuleList([ours]))
    assert type(ours) is before


@pytest.mark.parametrize("exact", [True, False])
def test_models_that_need_not_be_exact_take_it(exact: bool, tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe")
    with open_model(tmp_path, exact=exact) as model:
        kinds = {type(each) for each in model.module.modules() if isinstance(each, Qwen3MoeRMSNorm)}
        assert (Qwen3MoeRMSNorm in kinds) == exact
