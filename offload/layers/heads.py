"""One token's queries, keys and values in one call, for models that need not be exact.

It stands for what most families' attention layers do before they look at the KV cache: three products, in some
norms of heads, and the rotation by position. Layers are known by their code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from offload.formats.cpu.token_heads import Heads, Projection
from offload.formats.nf4 import NF4
from offload.layers.attention import grouped_attention, is_grouped
from offload.layers.attention_code import Known, Norms, known_attention
from offload.layers.autocast import autocasts
from offload.layers.growing import append
from offload.layers.instead import with_ours
from offload.layers.kept import Kept
from offload.layers.linear import QuantisedLinear
from offload.layers.norms import rounds_twice
from offload.layers.products import PlainLinear
from offload.layers.sinks import computes_so, serves_sinks, sinks_attention


class _Attention(nn.Module):
    """Goes before a model's own class."""

    heads: Heads | None = None
    known: Known
    kept: Kept  # its parameters

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [B, T, H] -> [B, T, H], and weights where somebody asks for some."""
        own: Any = self
        heads, width = self.heads, own.head_dim
        cosines, sines = position_embeddings
        if (
            heads is None
            or hidden_states.shape[:2] != (1, 1)
            or not takes(hidden_states, cosines, sines, width)
            or not self.kept.holds()
        ):
            found: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            return found
        y = heads.compute(hidden_states, cosines, sines).view(1, -1, 1, width)
        shared = own.k_proj.out_features // width
        query, key, value = y.split([y.shape[1] - 2 * shared, shared, shared], dim=1)
        if past_key_values is not None:
            key, value = append(past_key_values, key, value, own.layer_idx)
        told: dict[str, Any] = {"scaling": own.scaling, **kwargs}
        if self.known.sinks:
            mixed, weights = sinks_attention(self, query, key, value, attention_mask, s_aux=own.sinks, **told)
        else:
            mixed, weights = grouped_attention(self, query, key, value, attention_mask, **told)
        return own.o_proj(mixed.reshape(1, 1, -1)), weights


def use_heads(model: nn.Module) -> None:
    """Let the attention layers of `model` whose code is known, and whose matrices a kernel takes, begin a token so."""
    each: Any
    for each in model.modules():
        cls: Any = type(each)
        known = known_attention(cls) if hasattr(each, "q_proj") and not isinstance(each, _Attention) else None
        heads = _heads(each, known.norms) if known is not None and _is_served(each, known) else None
        if heads is not None:
            each.__class__ = with_ours(_Attention, cls)
            each.heads, each.known, each.kept = heads, known, Kept(each.modules())


def _is_served(layer: Any, known: Known) -> bool:
    """Whether one token's attention is our kernel's."""
    return computes_so(layer) and serves_sinks(layer.sinks) if known.sinks else is_grouped(layer)


def _heads(layer: Any, norms: Norms) -> Heads | None:
    """None where a kernel does not serve its matrices, or the layer clips what they give."""
    width, projections, twice = layer.head_dim, [], True
    if width % 32 or width > 256 or (norms is Norms.ALL and getattr(layer.config, "clip_qkv", None) is not None):
        return None
    epsilon = layer.q_norm.variance_epsilon if norms is not Norms.NONE else 0.0
    for name in ("q", "k", "v"):
        linear = getattr(layer, f"{name}_proj")
        blocks = row_blocks(linear, width)
        if blocks is None or is_plain(linear) != is_plain(layer.q_proj):
            return None
        norm = normed = 0
        if norms is not Norms.NONE and name != "v":
            own: Any = getattr(layer, f"{name}_norm")
            normed = width if norms is Norms.HEADS else linear.out_features
            cls: Any = type(own)
            rounds = rounds_twice(cls)
            if rounds is None or own.weight.dtype != torch.bfloat16 or len(own.weight) != normed:
                return None
            twice, norm = rounds, own.weight.data_ptr()
        for numbers, absmax, bias, n in blocks:
            projections.append(Projection(numbers, absmax, bias, norm, n, rotated=name != "v", normed=normed))
            if norms is Norms.ALL:
                norm = 0  # which begins with the first block
    levels = None if is_plain(layer.q_proj) else layer.q_proj.blocks[0].form.integers()
    return Heads(projections, layer.q_proj.in_features, width, epsilon, twice=twice, levels=levels)


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer's matrix is a plain one that our kernel multiplies."""
    return isinstance(linear, PlainLinear)


def row_blocks(linear: nn.Module, multiple: int) -> list[tuple[int, int, int, int]] | None:
    """The rows of a layer, block by block, where a token's kernels take its NF4 or bfloat16 matrix, and a block has a
    `multiple` of rows: addresses of codes or numbers, of absmax and bias, 0 for none, and how many rows."""
    if not isinstance(linear, (PlainLinear, QuantisedLinear)):
        return None
    if linear.bias is not None and linear.bias.dtype != torch.bfloat16:
        return None
    if isinstance(linear, PlainLinear):
        weight, n = linear.weight, linear.out_features
        if weight.dtype != torch.bfloat16 or not weight.is_cpu or not weight.is_contiguous() or n % multiple:
            return None
        return [(weight.data_ptr(), 0, 0 if linear.bias is None else linear.bias.data_ptr(), n)]
    found = []
    for block in linear.blocks:
        place = block.form.place(block.fields) if isinstance(block.form, NF4) else None
        n = block.last - block.first
        if place is None or n % multiple:
            return None
        bias = 0 if linear.bias is None else linear.bias.data_ptr() + 2 * block.first
        found.append((place[0], place[1], bias, n))
    return found


def takes(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, width: int) -> bool:
    """Whether the kernels take a token's hidden states and its position."""
    bf16 = x.dtype is cosines.dtype is sines.dtype is torch.bfloat16
    there = x.device.type == cosines.device.type == "cpu" and cosines.numel() == sines.numel() in (width, width // 2)
    whole = x.is_contiguous() and cosines.is_contiguous() and sines.is_contiguous()
    return bf16 and there and whole and not autocasts(x)
