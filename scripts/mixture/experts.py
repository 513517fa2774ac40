"""The experts of a layer, forward and backward by hand: one after the other, each with all its tokens at once.

What an expert computes lies in columns, a token a column, so that gate and up projections are each in one piece.
Rows in its order are gathered and added up only where they are used, and stay in the caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

PAD = 64  # rows: an expert's products have a multiple of it, since each new size costs more than its zeros


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
    ) -> torch.Tensor:
        inner = down.shape[2]
        places, tokens, ends = grouped(chosen, len(down))
        scale = x.new_zeros(len(tokens))
        scale[places.flatten()] = weights.flatten().to(x.dtype)
        kept: list[torch.Tensor] = []
        out = x.new_empty(len(tokens), x.shape[1])
        for expert, part in enumerate(ends):
            both = torch.mm(gate_up[expert], x.index_select(0, tokens[part]).T)  # [2I, n]
            kept.append(both)
            hidden = F.silu(both[:inner]).mul_(both[inner:]).mul_(scale[part])
            torch.mm(hidden.T, down[expert].T, out=out[part])
        ctx.save_for_backward(x, gate_up, down, places, tokens, scale, *kept)
        ctx.ends = ends
        return _summed(out, places)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = outputs
        x, gate_up, down, places, tokens, scale, *kept = ctx.saved_tensors
        inner = down.shape[2]
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        d_scale = scale.new_empty(len(tokens), dtype=torch.float32)
        dx = x.new_empty(len(tokens), x.shape[1])
        for expert, (part, both) in enumerate(zip(ctx.ends, kept, strict=True)):
            d_out = dy.index_select(0, tokens[part])  # [n, H]
            gate, up = both[:inner], both[inner:]
            silu = F.silu(gate)
            hidden = silu * up
            d_hidden = torch.mm(down[expert].T, d_out.T)  # [I, n]
            torch.sum(d_hidden * hidden, 0, dtype=torch.float32, out=d_scale[part])
            torch.mm(d_out.T, hidden.mul_(scale[part]).T, out=d_down[expert])
            d_hidden.mul_(scale[part])
            d_both = torch.empty_like(both)
            torch.mul(d_hidden, silu, out=d_both[inner:])
            torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_both[:inner])
            torch.mm(d_both, x.index_select(0, tokens[part]), out=d_gate_up[expert])
            torch.mm(d_both.T, gate_up[expert], out=dx[part])
        return _summed(dx, places), None, d_scale[places.flatten()].view(places.shape), d_gate_up, d_down


def grouped(chosen: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """How the pairs of `chosen` [T, K] lie in rows sorted by expert, each expert's rows filled up to a multiple of PAD.

    (the row of each pair [T, K], the token of each row, each expert's rows). Rows that fill up have token 0.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=experts)
    sizes = (counts + PAD - 1) // PAD * PAD
    ends = sizes.cumsum(0)
    shift = (ends - sizes) - (counts.cumsum(0) - counts)
    rows = torch.arange(len(flat)) + shift[flat[order]]
    tokens = torch.zeros(int(ends[-1]), dtype=torch.long)
    tokens[rows] = order // chosen.shape[1]
    places = torch.empty_like(flat)
    places[order] = rows
    starts = (ends - sizes).tolist()
    parts = [slice(start, end) for start, end in zip(starts, ends.tolist(), strict=True)]
    return places.view(chosen.shape), tokens, parts


def _summed(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[T, H]: the rows of each token's pairs, added up."""
    return F.embedding_bag(places, rows, mode="sum")


def experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """sum_k weights[t, k] * expert(chosen[t, k])(x[t]) for x [T, H]; matrices as the stock class has them."""
    found: torch.Tensor = _Experts.apply(x, chosen, weights, gate_up, down)
    return found
