"""The weighted sum of what experts gave: torch's bits, in one pass."""

from __future__ import annotations

import pytest
import torch

from offload.formats.cpu import native
from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.combine import combine, job, serves

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", range(1, 17))
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_bits_are_torch_s(tokens: int, top_k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_threads, "count", lambda: 3)
    for n in (8, 40, 2880):
        y, weights = torch.randn(tokens * top_k, n).bfloat16(), torch.rand(tokens, top_k).to(dtype)
        y[0, 0], y[-1, -1] = float("inf"), float("nan")
        expected = (y * weights.reshape(-1, 1)).view(tokens, top_k, n).sum(dim=1).bfloat16()
        assert serves(y, weights)
        torch.testing.assert_close(combine(y, weights), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_may_be_added_to_something(dtype: torch.dtype) -> None:
    y, weights, before = torch.randn(24, 40).bfloat16(), torch.rand(3, 8).to(dtype), torch.randn(3, 40).bfloat16()
    out = torch.empty_like(before)
    places = y.data_ptr(), weights.data_ptr(), before.data_ptr(), out.data_ptr()
    told = job(*places, 3, 8, 40, rounds=dtype is torch.bfloat16)
    lib = native.library()
    assert lib is not None
    lib.combine(told.buffer_info()[0], 1)
    assert torch.equal(out, before + combine(y, weights))


def test_what_it_does_not_take() -> None:
    y, weights = torch.zeros(6, 8).bfloat16(), torch.zeros(3, 2)
    assert serves(y, weights)
    assert not serves(y.float(), weights) and not serves(y, weights.double())
    assert not serves(torch.zeros(17, 8).bfloat16(), torch.zeros(1, 17))
    assert not serves(y[:, :4], weights) and not serves(y.new_zeros(6, 12), weights)
    assert not serves(y.new_zeros(6, 16)[:, ::2], weights) and not serves(y, weights.new_zeros(2, 3).t())
    assert not serves(y, weights.clone().requires_grad_())
    assert not serves(y.to("meta"), weights)
