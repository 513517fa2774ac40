"""Attention with normed, rotated heads, forward and backward by hand: one sequence after the other, in the caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Heads:
    """How a token's projections are cut into heads: queries, then keys, then values."""

    queries: int
    groups: int  # of keys, and of values
    size: int
    epsilon: float

    @property
    def turned(self) -> int:
        """How many are normed and rotated: queries and keys."""
        return self.queries + self.groups


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, turn: torch.Tensor, mask: torch.Tensor, heads: Heads
    ) -> torch.Tensor:
        batch, length, _ = rows.shape
        out = rows.new_empty(batch, length, heads.queries * heads.size)
        shares = rows.new_empty(batch, heads.groups, heads.queries // heads.groups * length, length)
        inverse = rows.new_empty(batch, length, heads.turned, 1, dtype=torch.float32)
        for at in range(batch):
            q, k, v = _heads(rows[at], weight, turn, heads, inverse[at])
            scores = torch.bmm(q, k.transpose(1, 2))
            scores.view(-1, length, length).add_(mask)
            torch.softmax(scores, -1, out=shares[at])
            out[at].view(length, heads.queries, -1).copy_(_by_token(torch.bmm(shares[at], v), length))
        ctx.save_for_backward(rows, weight, turn, shares, inverse)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_out,) = outputs
        rows, weight, turn, shares, inverse = ctx.saved_tensors
        heads: Heads = ctx.heads
        length = rows.shape[1]
        d_rows, d_weight = torch.empty_like(rows), torch.zeros_like(weight)
        for at in range(len(rows)):
            q, k, v = _heads(rows[at], weight, turn, heads, inverse[at], known=True)
            d_row = _by_head(d_out[at].view(length, heads.queries, -1), heads.groups)
            d_share = torch.bmm(d_row, v.transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_share, shares[at], -1, rows.dtype)
            d_heads = d_rows[at].view(length, -1, heads.size)
            d_heads[:, heads.turned :] = torch.bmm(shares[at].transpose(1, 2), d_row).transpose(0, 1)
            d_turned = rows.new_empty(length, heads.turned, heads.size, dtype=torch.float32)
            d_turned[:, : heads.queries] = _by_token(torch.bmm(d_scores, k), length)
            d_turned[:, heads.queries :] = torch.bmm(d_scores.transpose(1, 2), q).transpose(0, 1)
            normal = rows[at].view(length, -1, heads.size)[:, : heads.turned] * inverse[at]
            d_normal = _turned_back(d_turned, turn)
            d_weight += (d_normal * normal).sum(0)
            d_normal *= weight
            along = (d_normal * normal).mean(-1, keepdim=True)
            d_heads[:, : heads.turned] = d_normal.addcmul_(normal, along, value=-1).mul_(inverse[at])
        return d_rows, d_weight, None, None, None


def _heads(
    row: torch.Tensor,
    weight: torch.Tensor,
    turn: torch.Tensor,
    heads: Heads,
    inverse: torch.Tensor,
    known: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q [G, H/G * S, D], k [G, S, D], v [G, S, D]) of one sequence.

    One over the size of each head, `inverse` [S, H + G, 1], is filled in unless it is `known`.
    """
    length = len(row)
    cut = row.view(length, -1, heads.size)
    x = cut[:, : heads.turned].float()
    if not known:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(heads.size)
        torch.rsqrt(size.add_(heads.epsilon), out=inverse)
    x = (x * inverse).mul_(weight)
    turned = (x * turn[0]).addcmul_(x.roll(heads.size // 2, -1), turn[1]).to(row.dtype)
    q = _by_head(turned[:, : heads.queries], heads.groups)
    return q, turned[:, heads.queries :].transpose(0, 1), cut[:, heads.turned :].transpose(0, 1)


def _turned_back(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """What `turned` was made of, if it is x: the rotation's transpose, for gradients."""
    return (x * turn[0]).add_((x * turn[1]).roll(x.shape[-1] // 2, -1))


def _by_head(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[S, H, D] as [G, H/G * S, D]."""
    return x.transpose(0, 1).reshape(groups, -1, x.shape[-1])


def _by_token(x: torch.Tensor, length: int) -> torch.Tensor:
    """[G, H/G * S, D] as [S, H, D]."""
    return x.view(-1, length, x.shape[-1]).transpose(0, 1)


def attention(
    rows: torch.Tensor, weight: torch.Tensor, turn: torch.Tensor, mask: torch.Tensor, heads: Heads
) -> torch.Tensor:
    """Attention of projections [B, S, (H + 2G) * D]: [B, S, H * D].

    `weight` [H + G, D], of the heads' norm, has the scale of the scores in it; `turn` [2, S, 1, D] is from `turns`;
    `mask` [S, S] is added to the scores.
    """
    found: torch.Tensor = _Attention.apply(rows, weight, turn, mask, heads)
    return found


def turns(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[2, S, 1, D] of the stock class' cosines and sines [S, D]: what a head, and itself rolled by half, are times."""
    low, high = sin.chunk(2, -1)
    return torch.stack([cos, torch.cat([-low, high], -1)])[:, :, None]
