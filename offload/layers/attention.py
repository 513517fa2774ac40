"""Attention of one new token on a CPU: all queries that share keys and values together.

torch's `scaled_dot_product_attention` multiplies each query by itself. On a CPU one row takes it nearly as long as
eight rows. Our kernel (`offload/formats/cpu/native/attention.c`) takes eight queries together and gives every thread a
part of the keys; what it does not take is given to torch as rows of one product, which is 4 times (float32) to 16 times
(bfloat16) as fast. Sums are then added up in another order, so this is for models that need not be exact.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from offload.formats.cpu.attention import one_token, serves
from offload.layers.source import class_code

_NAME = "offload_grouped"
_OTHERWISE = ("cache", "position_bias", "softcap")
"""What makes `sdpa_attention_forward` another attention. It takes no notice of other names."""


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **told: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, T, D], key and value [B, H / G, L, D] -> [B, T, H, D], as transformers' `sdpa_attention_forward`."""
    rows, heads, tokens, width = query.shape
    shared = key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1:3] == (1, 1)
    usual = tokens == 1 and not module.training and not is_special(told)
    if usual and serves(query, key, value, attention_mask):
        y = one_token(query, key, value, attention_mask, width**-0.5 if scaling is None else scaling)
        return y.view(rows, 1, heads, width), None
    if not usual or heads == shared or not one_mask:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **told
        )
        return found
    grouped = query.reshape(rows, shared, heads // shared, width)
    y = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return y.reshape(rows, 1, heads, y.shape[-1]), None


def use_grouped_attention(model: nn.Module) -> None:
    """Let the attention layers of `model` that go by transformers' interface, and ask no more of it, compute so."""
    for module in model.modules():
        if attends_by(module, "sdpa") and _goes_by_the_interface(type(module)):
            attend_by(module, _NAME)


def is_grouped(module: nn.Module) -> bool:
    """Whether an attention layer computes so."""
    return attends_by(module, _NAME)


def attend_by(module: nn.Module, name: str) -> None:
    """Let an attention layer compute by what transformers' interface has under a name."""
    own: Any = copy(module.config)
    own._attn_implementation = name
    module.config = own


def attends_by(module: nn.Module, name: str) -> bool:
    """Whether it does."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == name


def is_special(told: dict[str, Any]) -> bool:
    """Whether a layer is `told` something that makes another attention."""
    return any(told.get(name) is not None for name in _OTHERWISE)


def _goes_by_the_interface(cls: Any) -> bool:
    """Whether it looks its attention up by the name in its configuration, and does nothing else by that name."""
    code = class_code(cls)
    return code is not None and code.count("_attn_implementation") == 1 and "ALL_ATTENTION_FUNCTIONS" in code


AttentionInterface.register(_NAME, grouped_attention)
