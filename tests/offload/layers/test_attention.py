"""One token's attention with queries that share keys: the same but for rounding, and nothing else becomes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ids, one_thread, open_model, same_bits, save
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from offload.layers import attention
from offload.layers.attention import grouped_attention

_threads = pytest.fixture(autouse=True)(one_thread)


class Module(torch.nn.Module):
    """What attention functions ask of a layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True
        self.eval()


def tensors(rows: int, heads: int, shared: int, tokens: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(rows + heads + tokens + length)
    return [torch.randn(rows, h, n, 16).to(dtype) for h, n in ((heads, tokens), (shared, length), (shared, length))]


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product that queries were grouped for."""
    seen: list[int] = []
    original = attention.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(query.shape[2])
        return original(query, *args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("rows", "heads", "shared", "length"), [(1, 8, 2, 33), (3, 6, 1, 70), (2, 4, 2, 1)])
def test_one_token_is_the_same_but_for_rounding(
    rows: int, heads: int, shared: int, length: int, dtype: torch.dtype, near: float, masked: bool, grouped: list[int]
) -> None:
    query, key, value = tensors(rows, heads, shared, 1, length, dtype)
    mask = torch.rand(rows, 1, 1, length) < 0.7 if masked else None
    if mask is not None:
        mask[..., 0] = True
    module = Module(heads // shared)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    y, weights = grouped_attention(module, query, key, value, mask, scaling=0.3, position_ids=torch.zeros(1, 1))
    assert grouped == [heads // shared] and weights is None
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    torch.testing.assert_close(y, expected, rtol=near, atol=near)


@torch.no_grad()
@pytest.mark.parametrize(
    ("heads", "tokens", "told"),
    [(2, 1, {}), (4, 5, {}), (4, 1, {"position_bias": torch.ones(1, 4, 1, 9)}), (4, 1, {"mask_by_head": True})],
)
def test_whatever_else_there_is_stays_transformers_own(
    heads: int, tokens: int, told: dict[str, Any], grouped: list[int]
) -> None:
    query, key, value = tensors(1, heads, 2, tokens, 9, torch.float32)
    mask = torch.rand(1, heads, tokens, 9) < 0.7 if told.pop("mask_by_head", False) else None
    module = Module(heads // 2)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3, **told)
    y, _ = grouped_attention(module, query, key, value, mask, scaling=0.3, **told)
    assert same_bits(y, expected) and grouped == []


@pytest.mark.parametrize("exact", [True, False])
def test_a_model_that_need_not_be_exact_takes_it_for_its_tokens(
    exact: bool, tmp_path: Path, grouped: list[int]
) -> None:
    save(tmp_path, "qwen3_moe")
    with open_model(tmp_path, exact=exact) as model:
        names = {module.config._attn_implementation for module in model.module.modules() if hasattr(module, "config")}
        assert names == ({"sdpa"} if exact else {"sdpa", "offload_grouped"})
        assert model.config._attn_implementation == "sdpa"
        reply = model.generate(ids(2, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        layers = model.config.num_hidden_layers
    assert grouped == ([] if exact else 3 * layers * [2])
    with open_model(tmp_path, exact=True) as model:
        expected = model.generate(ids(2, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(reply, expected)
