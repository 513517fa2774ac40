"""One token's queries, keys and values in one call, for models that need not be exact.

It stands for what most families' attention layers do before they look at the KV cache: three products, in some
norms of heads, and the rotation by position. Layers are known by their code.
"""

from __future__ import annotations

import ast
import functools
import sys
import textwrap
from enum import Enum
from typing import Any

import torch
from torch import nn

from offload.formats.cpu.nf4_heads import Heads, Projection
from offload.formats.nf4 import NF4
from offload.layers.attention import grouped_attention, is_grouped
from offload.layers.autocast import autocasts
from offload.layers.growing import append
from offload.layers.instead import with_ours
from offload.layers.linear import QuantisedLinear
from offload.layers.norms import rounds_twice
from offload.layers.source import forward_code, function_code

_BEGIN = """
input_shape = hidden_states.shape[:-1]
hidden_shape = (*input_shape, -1, self.head_dim)
query_states = {query}
key_states = {key}
value_states = self.v_proj(hidden_states){heads}
"""
_EACH = ".view(hidden_shape).transpose(1, 2)"
_PLAIN = _BEGIN.format(
    query=f"self.q_proj(hidden_states){_EACH}", key=f"self.k_proj(hidden_states){_EACH}", heads=_EACH
)
_NORMED = _BEGIN.format(
    query="self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)",
    key="self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)",
    heads=_EACH,
)
_STATES = "query_states", "key_states", "value_states"
_CLIPPED = "".join(f"    {each}.clamp_(min=-self.config.clip_qkv, max=self.config.clip_qkv)\n" for each in _STATES)
_ALL_NORMED = [
    _BEGIN.format(
        query="self.q_norm(self.q_proj(hidden_states))", key="self.k_norm(self.k_proj(hidden_states))", heads=""
    )
    + clip
    + "".join(f"{each} = {each}.view({shape}).transpose(1, 2)\n" for each in _STATES)
    for clip, shape in (("", "hidden_shape"), (f"if self.config.clip_qkv is not None:\n{_CLIPPED}", "*hidden_shape"))
]
_POSITIONS = """
cos, sin = position_embeddings
query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
if past_key_values is not None:
    key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
"""
_ATTENTION = (
    "attention_interface(self, query_states, key_states, value_states, attention_mask, dropout=0.0 if not "
    "self.training else self.attention_dropout, scaling=self.scaling, {told}**kwargs)"
)
_WINDOWS = "self.sliding_window", "getattr(self.config, 'sliding_window', None)"  # which the mask takes care of
_REST = """
attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
    self.config._attn_implementation, eager_attention_forward)
attn_output, attn_weights = {attention}
attn_output = attn_output.reshape(*input_shape, -1).contiguous()
attn_output = self.o_proj(attn_output)
return (attn_output, attn_weights)
"""
_ROTATION = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = q * cos + rotate_half(q) * sin
    k_embed = k * cos + rotate_half(k) * sin
    return (q_embed, k_embed)
"""
_HALVES = """
def rotate_half(x):
    x1 = x[..., :x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2:]
    return torch.cat((-x2, x1), dim=-1)
"""


def _lines(code: str) -> str:
    return ast.unparse(ast.parse(textwrap.dedent(code)))


class Norms(Enum):
    """What the queries and the keys of a layer are normed by, each: not at all, head by head, or all heads at once."""

    NONE = 0
    HEADS = 1
    ALL = 2


_FORWARD = {
    _lines(begin + _POSITIONS + _REST.format(attention=_ATTENTION.format(told=told))): norms
    for norms, begins in ((Norms.NONE, [_PLAIN]), (Norms.HEADS, [_NORMED]), (Norms.ALL, _ALL_NORMED))
    for begin in begins
    for told in ("", *(f"sliding_window={window}, " for window in _WINDOWS))
}
"""What the layers' `forward` does, by its code."""


class _Attention(nn.Module):
    """Goes before a model's own class."""

    heads: Heads | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [B, T, H] -> [B, T, H], and no weights."""
        own: Any = self
        heads, width = self.heads, own.head_dim
        cosines, sines = position_embeddings
        if heads is None or hidden_states.shape[:2] != (1, 1) or not takes(hidden_states, cosines, sines, width):
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
        mixed, _ = grouped_attention(self, query, key, value, attention_mask, scaling=own.scaling, **kwargs)
        return own.o_proj(mixed.reshape(1, 1, -1)), None


def use_heads(model: nn.Module) -> None:
    """Let the attention layers of `model` whose code is known, and whose matrices are NF4, begin a token so."""
    each: Any
    for each in model.modules():
        cls: Any = type(each)
        norms = norms_of(cls) if hasattr(each, "q_proj") and is_grouped(each) else None
        heads = None if norms is None else _heads(each, norms)
        if heads is not None:
            each.__class__ = with_ours(_Attention, cls)
            each.heads = heads


def _heads(layer: Any, norms: Norms) -> Heads | None:
    """None where a kernel does not serve its matrices, or the layer clips what they give."""
    width, projections, twice = layer.head_dim, [], True
    if width % 32 or width > 256 or (norms is Norms.ALL and getattr(layer.config, "clip_qkv", None) is not None):
        return None
    epsilon = layer.q_norm.variance_epsilon if norms is not Norms.NONE else 0.0
    for name in ("q", "k", "v"):
        linear = getattr(layer, f"{name}_proj")
        blocks = nf4_blocks(linear, width)
        if blocks is None:
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
        for codes, absmax, bias, n in blocks:
            projections.append(Projection(codes, absmax, bias, norm, n, rotated=name != "v", normed=normed))
            if norms is Norms.ALL:
                norm = 0  # which begins with the first block
    levels = layer.q_proj.blocks[0].form.integers()
    return Heads(projections, layer.q_proj.in_features, width, epsilon, twice=twice, levels=levels)


def nf4_blocks(linear: nn.Module, multiple: int) -> list[tuple[int, int, int, int]] | None:
    """The rows of a quantised layer, block by block, where a kernel of NF4 matrices serves them, and a block has a
    `multiple` of rows: addresses of codes, absmax and bias, 0 for none, and how many rows."""
    if not isinstance(linear, QuantisedLinear) or (linear.bias is not None and linear.bias.dtype != torch.bfloat16):
        return None
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
    there = x.device.type == cosines.device.type == "cpu" and cosines.numel() == sines.numel() == width
    whole = x.is_contiguous() and cosines.is_contiguous() and sines.is_contiguous()
    return bf16 and there and whole and not autocasts(x)


@functools.cache
def norms_of(cls: Any) -> Norms | None:
    """What norms layers of this class have; None for a class that does something else."""
    if issubclass(cls, _Attention):
        return None
    module = vars(sys.modules[cls.__module__])
    for name, wanted in (("apply_rotary_pos_emb", _ROTATION), ("rotate_half", _HALVES)):
        if function_code(module.get(name)) != _lines(wanted):
            return None
    return _FORWARD.get(forward_code(cls) or "")
