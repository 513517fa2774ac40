"""One token's way through a decoder layer, up to its experts, in one call, for models that need not be exact.

It stands for what most families' decoder layers do: norm, attention, sum, norm. Layers are known by their code. Where a
module on the way has hooks, each is called as before. A layer's experts may be under way when it returns: the next one
waits for them.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from itertools import chain, pairwise
from typing import Any

import torch
from torch import nn

from offload.formats.cpu import begun
from offload.formats.cpu.attention import serves_mask
from offload.formats.cpu.token_sublayer import AttentionSublayer, Rows
from offload.layers.attention import is_special
from offload.layers.chain import Following, chains
from offload.layers.growing import grow, length_with_next
from offload.layers.heads import is_plain, row_blocks, takes
from offload.layers.instead import with_ours
from offload.layers.kept import Kept
from offload.layers.moe_block import MoeBlock
from offload.layers.norms import rounds_twice
from offload.layers.source import forward_code

_TOLD = (
    "attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache, "
    "position_embeddings=position_embeddings",
    "position_embeddings=position_embeddings, attention_mask=attention_mask, position_ids=position_ids, "
    "past_key_values=past_key_values",
)
_LINES = """
residual = hidden_states
hidden_states = self.input_layernorm(hidden_states)
hidden_states, _ = self.self_attn(hidden_states=hidden_states, {told}, **kwargs)
hidden_states = residual + hidden_states
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
{mlp} = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states
"""
_FORWARD = {
    ast.unparse(ast.parse(_LINES.format(told=told, mlp=mlp)))
    for told in _TOLD
    for mlp in ("hidden_states", "(hidden_states, _)")
}
"""What the layers' `forward` does; some experts give their weights, too."""


class _DecoderLayer(nn.Module):
    """Goes before a model's own class."""

    sublayer: AttentionSublayer | None = None
    moe_block: MoeBlock | None = None
    width: int  # of a head
    like: torch.Tensor  # a key of no token
    hooks: tuple[Mapping[int, Any], ...]  # those of the modules that the call stands for
    kept: Kept  # their parameters
    following: Following | None = None  # the layer that gets what this one gives, if that waits for it

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states [B, T, H] -> [B, T, H]."""
        own: Any = self
        sublayer, grown = self.sublayer, None
        if (
            sublayer is not None
            and past_key_values is not None
            and self._takes(hidden_states, position_embeddings, kwargs)
        ):
            index = own.self_attn.layer_idx
            if self._takes_mask(attention_mask, past_key_values, index):
                grown = grow(past_key_values, index, self.like)
        if sublayer is None or grown is None:
            begun.wait()
            found: torch.Tensor = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return found
        (cosines, sines), (key, value) = position_embeddings, grown
        block = self.moe_block
        router = None if block is None else block.router(hidden_states.shape[-1])
        residual, hidden_states = sublayer.compute(hidden_states, cosines, sines, key, value, attention_mask, router)
        if block is not None and router is not None:
            goes_on = self.following is not None and self.following.gets_all_of(self)
            return block.experts(hidden_states.view(1, -1), router, residual, goes_on=goes_on)
        y = own.mlp(hidden_states)
        result: torch.Tensor = residual + (y[0] if isinstance(y, tuple) else y)
        return result

    def _takes(self, x: torch.Tensor, positions: Any, told: dict[str, Any]) -> bool:
        cosines, sines = positions
        return (
            x.shape[:2] == (1, 1)
            and takes(x, cosines, sines, self.width)
            and not self.training
            and not is_special(told)
            and not any(self.hooks)
            and self.kept.holds()
        )

    def _takes_mask(self, mask: torch.Tensor | None, cache: Any, layer_index: int) -> bool:
        """Eager attention, which layers with sinks have, adds any mask to the scores, and ours no truth values."""
        own: Any = self
        if mask is not None and mask.dtype is torch.bool and own.self_attn.known.sinks:
            return False
        return serves_mask(mask, 1, length_with_next(cache, layer_index, torch.bfloat16))


def use_sublayers(model: nn.Module) -> None:
    """Let the decoder layers of `model` whose code is known, and whose attention has `heads`, begin a token so."""
    for each in model.modules():
        cls: Any = type(each)
        heads = getattr(getattr(each, "self_attn", None), "heads", None)
        if heads is not None and _is_known(cls):
            layer: Any = each
            sublayer = _sublayer(layer)
            if sublayer is not None:
                layer.__class__ = with_ours(_DecoderLayer, cls)
                layer.sublayer, layer.width = sublayer, heads.width
                shared = layer.self_attn.k_proj.out_features // heads.width
                layer.like = torch.empty(1, shared, 0, heads.width, dtype=torch.bfloat16, device="cpu")
                passed = layer.input_layernorm, layer.post_attention_layernorm, *layer.self_attn.modules()
                hooks = [(each._forward_hooks, each._forward_pre_hooks) for each in passed]
                layer.hooks, layer.kept = tuple(chain.from_iterable(hooks)), Kept([layer, *passed])
                layer.moe_block = MoeBlock.of(layer.mlp)
    for layers in chains(model):
        for i, (before, after) in enumerate(pairwise(layers), start=1):
            if isinstance(before, _DecoderLayer) and isinstance(after, _DecoderLayer):
                before.following = Following(layers, i)


def _sublayer(layer: Any) -> AttentionSublayer | None:
    """None where a kernel does not serve its parts."""
    attention = layer.self_attn
    output = row_blocks(attention.o_proj, 32)
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    own, other = (_kind(norm) for norm in (before, after))
    if output is None or is_plain(attention.o_proj) != is_plain(attention.q_proj):
        return None
    if own is None or own != other or {before.weight.dtype, after.weight.dtype} != {torch.bfloat16}:
        return None
    return AttentionSublayer(
        attention.heads,
        [Rows(*block) for block in output],
        before.weight.data_ptr(),
        after.weight.data_ptr(),
        own[1],
        twice=own[0],
        scale=attention.scaling,
        sinks=attention.sinks if attention.known.sinks else None,
    )


def _kind(norm: Any) -> tuple[bool, float] | None:
    """Whether a norm rounds twice, and what it adds; None for one that is not known."""
    cls: Any = type(norm)
    twice = rounds_twice(cls)
    return None if twice is None else (twice, norm.variance_epsilon)


@functools.cache
def _is_known(cls: Any) -> bool:
    return not issubclass(cls, _DecoderLayer) and forward_code(cls) in _FORWARD
