"""Attention layers that are known by their code: what they do before and beside the attention itself."""

from __future__ import annotations

import ast
import functools
import sys
import textwrap
from enum import Enum
from typing import Any, NamedTuple

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
_SHARED_ROTATION = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = _apply_rotary_emb(q, cos, sin)
    k_embed = _apply_rotary_emb(k, cos, sin)
    return (q_embed, k_embed)
"""
_SHARED_HALVES = """
def _apply_rotary_emb(x, cos, sin):
    first_half, second_half = torch.chunk(x, 2, dim=-1)
    first_ = first_half * cos - second_half * sin
    second_ = second_half * cos + first_half * sin
    return torch.cat((first_, second_), dim=-1)
"""
_HALVES = """
def rotate_half(x):
    x1 = x[..., :x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2:]
    return torch.cat((-x2, x1), dim=-1)
"""
_ROTATIONS = (
    {"apply_rotary_pos_emb": _ROTATION, "rotate_half": _HALVES},
    {"apply_rotary_pos_emb": _SHARED_ROTATION, "_apply_rotary_emb": _SHARED_HALVES},
)
"""The functions of a model's module that rotate; in the second way both halves of a head share cosines and sines."""
_SINKS = """
def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    key_states = repeat_kv(key, module.num_key_value_groups)
    value_states = repeat_kv(value, module.num_key_value_groups)
    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    sinks = module.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
    combined_logits = torch.cat([attn_weights, sinks], dim=-1)
    combined_logits = combined_logits - combined_logits.max(dim=-1, keepdim=True).values
    probs = F.softmax(combined_logits, dim=-1, dtype=combined_logits.dtype)
    scores = probs[..., :-1]
    attn_weights = nn.functional.dropout(scores, p=dropout, training=module.training).to(value_states.dtype)
    attn_output = torch.matmul(attn_weights, value_states)
    attn_output = attn_output.transpose(1, 2).contiguous()
    return (attn_output, attn_weights)
"""


def _lines(code: str) -> str:
    return ast.unparse(ast.parse(textwrap.dedent(code)))


class Norms(Enum):
    """What the queries and the keys of a layer are normed by, each: not at all, head by head, or all heads at once."""

    NONE = 0
    HEADS = 1
    ALL = 2


class Known(NamedTuple):
    """What a layer does."""

    norms: Norms
    sinks: bool = False
    """A score of each head, `self.sinks`, goes to no value."""


_FORWARD = {
    _lines(begin + _POSITIONS + _REST.format(attention=_ATTENTION.format(told=told + aux))): Known(norms, bool(aux))
    for norms, begins in ((Norms.NONE, [_PLAIN]), (Norms.HEADS, [_NORMED]), (Norms.ALL, _ALL_NORMED))
    for begin in begins
    for told in ("", *(f"sliding_window={window}, " for window in _WINDOWS))
    for aux in ("", "s_aux=self.sinks, ")
}
"""What the layers' `forward` does, by its code."""


@functools.cache
def known_attention(cls: Any) -> Known | None:
    """What layers of this class do; None for a class that does something else."""
    found = _FORWARD.get(forward_code(cls) or "")
    module = vars(sys.modules[cls.__module__])
    if not any(_has(module, functions) for functions in _ROTATIONS):
        return None
    if found is not None and found.sinks and not _has(module, {"eager_attention_forward": _SINKS}):
        return None
    return found


def _has(module: dict[str, Any], functions: dict[str, str]) -> bool:
    """Whether a module has functions of this code."""
    return all(function_code(module.get(name)) == _lines(code) for name, code in functions.items())
