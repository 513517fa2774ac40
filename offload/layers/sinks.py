"""Attention with sinks, a score of each head that goes to no value, as gpt-oss has, for models that need not be exact.

transformers writes all scores of all heads to memory. Here one token is our own kernel's, and more are torch's flash
attention: what it gives without sinks is scaled by the share of the softmax that they leave, which follows from the
logarithm of the sum of its exponentials.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from offload.formats.cpu.attention import one_token, serves
from offload.layers.attention import attend_by, attends_by, is_special
from offload.layers.attention_code import known_attention
from offload.layers.autocast import autocasts
from offload.layers.instead import original

_NAME = "offload_sinks"


def sinks_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    s_aux: torch.Tensor,
    **told: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query [B, H, T, D], key and value [B, H / G, L, D], s_aux [H] -> [B, T, H, D], and no weights.

    The model's own function computes where somebody may ask for weights, and what it alone does.
    """
    if not _takes(module, query, attention_mask, s_aux, told):
        own: Any = vars(sys.modules[original(type(module)).__module__])["eager_attention_forward"]
        found: tuple[torch.Tensor, torch.Tensor | None] = own(
            module, query, key, value, attention_mask, scaling=scaling, s_aux=s_aux, **told
        )
        return found
    rows, heads, tokens, width = query.shape
    if tokens == 1 and serves_sinks(s_aux) and serves(query, key, value, attention_mask):
        return one_token(query, key, value, attention_mask, scaling, s_aux).view(rows, 1, heads, width), None
    y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=attention_mask, scale=scaling
    )
    left = torch.sigmoid(sums - s_aux.float().view(1, heads, 1)).unsqueeze(-1)
    return (y * left).to(y.dtype).transpose(1, 2).contiguous(), None


def use_sinks(model: nn.Module) -> None:
    """Let the attention layers of `model` whose code is known, and has sinks, compute so."""
    for module in model.modules():
        cls: Any = type(module)
        known = known_attention(cls) if hasattr(module, "sinks") and attends_by(module, "eager") else None
        if known is not None and known.sinks:
            attend_by(module, _NAME)


def computes_so(module: nn.Module) -> bool:
    """Whether an attention layer computes so."""
    return attends_by(module, _NAME)


def serves_sinks(sinks: torch.Tensor) -> bool:
    """Whether our kernel takes them."""
    return sinks.dtype is torch.bfloat16 and sinks.is_cpu and sinks.is_contiguous()


def _takes(
    module: nn.Module, query: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor, told: dict[str, Any]
) -> bool:
    alone = not (module.training or module._forward_hooks or is_special(told) or autocasts(query))
    one_mask = mask is None or (mask.dtype is query.dtype and mask.dim() == 4 and mask.shape[1] == 1)
    return alone and one_mask and query.is_cpu and len(sinks) == query.shape[1]


AttentionInterface.register(_NAME, sinks_attention)
