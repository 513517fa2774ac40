"""Attention with sinks, of a prompt and of one token: as the model's own but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ids, open_model, resident, save
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from offload.layers.sinks import computes_so, sinks_attention, use_sinks

HEADS, SHARED, WIDTH = 8, 2, 32
SCALE = 0.2


def attention(dtype: torch.dtype = torch.bfloat16) -> Any:
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": SHARED, "head_dim": WIDTH, "hidden_size": 64}
    layer = GptOssAttention(GptOssConfig(**sizes, num_hidden_layers=1), 0).to(dtype).eval()
    layer.sinks = nn.Parameter(2 * torch.randn(HEADS).to(dtype), requires_grad=False)
    layer.config._attn_implementation = "eager"
    return layer


def inputs(tokens: int, length: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values, and a causal mask in which the first key of the second row is padding."""
    query = torch.randn(2, HEADS, tokens, WIDTH).to(dtype)
    key, value = torch.randn(2, 2, SHARED, length, WIDTH).to(dtype)
    seen = torch.ones(tokens, length).tril(length - tokens).bool().repeat(2, 1, 1, 1)
    seen[1, ..., 0] = False
    return query, key, value, torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def exact(layer: Any, *tensors: torch.Tensor) -> torch.Tensor:
    query, key, value, mask = (each.double() for each in tensors)
    key, value = (each.repeat_interleave(HEADS // SHARED, dim=1) for each in (key, value))
    sinks = layer.sinks.double().view(1, HEADS, 1, 1).expand(2, HEADS, query.shape[2], 1)
    scores = torch.cat([query @ key.transpose(2, 3) * SCALE + mask, sinks], dim=-1)
    return (scores.softmax(-1)[..., :-1] @ value).transpose(1, 2)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each call of the model's own attention."""
    found: list[int] = []
    own = modeling_gpt_oss.eager_attention_forward

    def counted(*args: Any, **told: Any) -> Any:
        found.append(1)
        return own(*args, **told)

    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (1, 300), (20, 20), (70, 300)])
def test_it_is_closer_than_the_model_s_own(tokens: int, length: int, dtype: torch.dtype, theirs: list[int]) -> None:
    layer, tensors = attention(dtype), inputs(tokens, length, dtype)
    expected = exact(layer, *tensors)
    y, weights = sinks_attention(layer, *tensors, scaling=SCALE, s_aux=layer.sinks)
    own = modeling_gpt_oss.eager_attention_forward(layer, *tensors, scaling=SCALE)[0]
    assert len(theirs) == 1 and weights is None
    assert y.shape == own.shape and y.dtype == dtype and y.is_contiguous()
    error, own_error = ((each.double() - expected).norm() / expected.norm() for each in (y, own))
    assert error < (0.004 if dtype is torch.bfloat16 else 1e-6) and error < 1.5 * own_error


def test_what_the_model_alone_computes(theirs: list[int]) -> None:
    layer, tensors = attention(), inputs(5, 9)
    told: dict[str, Any] = {"scaling": SCALE, "s_aux": layer.sinks}
    query, key, value, mask = tensors
    sinks_attention(layer, query, key, value, mask == 0, **told)
    sinks_attention(layer, query, key, value, mask.expand(2, HEADS, 5, 9), **told)
    sinks_attention(layer, *tensors, **told, softcap=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        sinks_attention(layer, *tensors, **told)
    hook = layer.register_forward_hook(lambda module, args, output: None)
    assert sinks_attention(layer, *tensors, **told)[1] is not None
    hook.remove()
    layer.train()
    sinks_attention(layer, *tensors, **told)
    assert len(theirs) == 6
    layer.eval()
    sinks_attention(layer, *tensors, **told)
    sinks_attention(layer, query, key, value, None, **told)
    assert len(theirs) == 6


def test_layers_that_are_known() -> None:
    layer = attention()
    model = nn.ModuleList([layer])
    use_sinks(model)
    assert computes_so(layer) and layer.config._attn_implementation == "offload_sinks"
    other = attention()
    other.config._attn_implementation = "flex_attention"
    use_sinks(nn.ModuleList([other]))
    assert not computes_so(other)


@pytest.mark.parametrize("exact", [True, False])
def test_models_that_need_not_be_exact_take_it(exact: bool, tmp_path: Path, theirs: list[int]) -> None:
    save(tmp_path, "gpt_oss")
    with open_model(tmp_path, exact=exact, dtype="bf16") as model, torch.no_grad():
        theirs.clear()
        found = model(ids(1, 40)).logits
    assert bool(theirs) == exact
    expected = resident(tmp_path, torch.bfloat16)(ids(1, 40)).logits
    assert torch.equal(found, expected) == exact
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert (errors < 0.06).sum() >= 36  # of 40 tokens: rounding sends some to other experts
