"""A stock model's forward pass, as training wants it: the same weights and mathematics, faster, with its losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from scripts.mixture.attention import Heads, attention, turns
from scripts.mixture.experts import experts
from scripts.mixture.products import next_token_loss, norm


@dataclass
class Losses:
    """Of one batch: per token, and of the routers, whose least is 1 with all experts used alike; 0 without experts."""

    next_token: torch.Tensor
    balance: torch.Tensor


def losses(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> Losses:
    """What `model` loses on `ids` [B, S + 1]; products are computed in `dtype`, all else in float32."""
    hidden, balance = final_hidden(model, ids[:, :-1], dtype)
    head = model.model.embed_tokens.weight.to(dtype)
    found = next_token_loss(hidden.flatten(0, 1), head, ids[:, 1:].flatten())
    return Losses(found, torch.stack(balance).mean() if balance else torch.zeros(()))


def final_hidden(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(what the head sees of `ids` [B, S], in `dtype`; each layer's load-balancing loss)."""
    decoder = model.model
    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)
    x = F.embedding(ids, decoder.embed_tokens.weight)
    cos, sin = decoder.rotary_emb(x, torch.arange(length)[None])
    turn = turns(cos[0], sin[0])
    balance: list[torch.Tensor] = []
    for layer in decoder.layers:
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        inner = norm(x, first.weight, first.variance_epsilon, dtype)
        x = x + _attend(layer.self_attn, inner, turn, mask)
        inner = norm(x, second.weight, second.variance_epsilon, torch.float32)
        x = x + _mlp(layer.mlp, inner.flatten(0, 1), dtype, balance).view_as(x)
    return norm(x, decoder.norm.weight, decoder.norm.variance_epsilon, dtype), balance


def _attend(part: Any, x: torch.Tensor, turn: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The attention sublayer of x [B, S, H]."""
    projections = torch.cat([part.q_proj.weight, part.k_proj.weight, part.v_proj.weight]).to(x.dtype)
    queries, groups = (len(each.weight) // part.head_dim for each in (part.q_proj, part.k_proj))
    scaled, plain = part.q_norm.weight * part.scaling, part.k_norm.weight
    weight = torch.cat([scaled.expand(queries, -1), plain.expand(groups, -1)])
    heads = Heads(queries, groups, part.head_dim, part.q_norm.variance_epsilon)
    found = attention(F.linear(x, projections), weight, turn, mask, heads)
    return F.linear(found, part.o_proj.weight.to(x.dtype))


def _mlp(part: Any, x: torch.Tensor, dtype: torch.dtype, balance: list[torch.Tensor]) -> torch.Tensor:
    """The MLP of x [T, H], float32: an ordinary one, or the experts that its router chooses."""
    if not hasattr(part, "experts"):
        x = x.to(dtype)
        up = F.silu(F.linear(x, part.gate_proj.weight.to(dtype))) * F.linear(x, part.up_proj.weight.to(dtype))
        return F.linear(up, part.down_proj.weight.to(dtype))
    shares = torch.softmax(F.linear(x, part.gate.weight), -1)
    weights, chosen = shares.topk(part.gate.top_k, -1)
    if part.gate.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    count = shares.shape[1]
    used = chosen.flatten().bincount(minlength=count).float() / chosen.numel()
    balance.append(count * (used * shares.mean(0)).sum())
    return experts(x.to(dtype), chosen, weights, part.experts.gate_up_proj.to(dtype), part.experts.down_proj.to(dtype))
