"""The costly parts of a step, forward and backward by hand: experts, attention, norms, next-token loss.

Each is the stock architecture's mathematics. On a CPU a step's time goes to products and to memory: what is computed
here in pieces stays in the caches, and nothing is kept for the way back that can be had again for less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

PAD = 64  # rows: an expert's products have a multiple of it, since each new size costs more than its zeros
CHUNK = 512  # tokens whose scores over the vocabulary are held at once


class _Experts(torch.autograd.Function):
    """sum_k weights[t, k] * expert(chosen[t, k])(x[t]) for x [T, H], expert after expert."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        experts, hidden, inner = down.shape
        places, tokens, ends = grouped(chosen, experts)
        scale = x.new_zeros(len(tokens), 1)
        scale[places.flatten(), 0] = weights.flatten().to(x.dtype)
        both = x.new_empty(len(tokens), 2 * inner)
        out = x.new_empty(len(tokens), hidden)
        start = 0
        for expert, end in enumerate(ends):
            part = slice(start, end)
            start = end
            torch.mm(x[tokens[part]], gate_up[expert].T, out=both[part])
            gate, up = both[part].chunk(2, 1)
            torch.mm(F.silu(gate).mul_(up).mul_(scale[part]), down[expert].T, out=out[part])
        ctx.save_for_backward(x, gate_up, down, places, tokens, scale, both)
        ctx.ends = ends
        return summed(out, places)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = outputs
        x, gate_up, down, places, tokens, scale, both = ctx.saved_tensors
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        d_scale = torch.empty_like(scale, dtype=torch.float32)
        dx = x.new_empty(len(tokens), x.shape[1])
        start = 0
        for expert, end in enumerate(ctx.ends):
            part = slice(start, end)
            start = end
            rows, d_out = x[tokens[part]], dy[tokens[part]]
            gate, up = both[part].chunk(2, 1)
            silu = F.silu(gate)
            hidden = silu * up
            d_hidden = d_out @ down[expert]
            d_scale[part] = (d_hidden * hidden).sum(1, keepdim=True, dtype=torch.float32)
            torch.mm(d_out.T, hidden.mul_(scale[part]), out=d_down[expert])
            d_hidden.mul_(scale[part])
            d_gate = torch.ops.aten.silu_backward(d_hidden * up, gate)
            d_both = torch.cat([d_gate, d_hidden.mul_(silu)], 1)
            torch.mm(d_both.T, rows, out=d_gate_up[expert])
            torch.mm(d_both, gate_up[expert], out=dx[part])
        return summed(dx, places), None, d_scale[places.flatten(), 0].view(places.shape), d_gate_up, d_down


def grouped(chosen: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """How the pairs of `chosen` [T, K] lie in rows sorted by expert, each expert's rows filled up to a multiple of PAD.

    (the row of each pair [T, K], the token of each row, where each expert's rows end). Rows that fill up have token 0.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=experts)
    ends = ((counts + PAD - 1) // PAD * PAD).cumsum(0)
    shift = (ends - (counts + PAD - 1) // PAD * PAD) - (counts.cumsum(0) - counts)
    rows = torch.arange(len(flat)) + shift[flat[order]]
    tokens = torch.zeros(int(ends[-1]), dtype=torch.long)
    tokens[rows] = order // chosen.shape[1]
    places = torch.empty_like(flat)
    places[order] = rows
    return places.view(chosen.shape), tokens, ends.tolist()


def summed(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[T, H]: the rows of each token's pairs, added up."""
    total = rows[places[:, 0]]
    for each in places[:, 1:].unbind(1):
        total += rows[each]
    return total


class _Attention(torch.autograd.Function):
    """Causal attention of q [B, H, S, D] on k and v [B, G, S, D], sequence after sequence; H is a multiple of G."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5
        out = torch.empty_like(q)
        shares = q.new_empty(*q.shape[:3], q.shape[2])
        for row in range(len(q)):
            key, value = (_repeated(each[row], q.shape[1]) for each in (k, v))
            scores = (q[row] * scale) @ key.transpose(1, 2)
            torch.softmax(scores.add_(mask), -1, out=shares[row])
            torch.bmm(shares[row], value, out=out[row])
        ctx.save_for_backward(q, k, v, shares)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_out,) = outputs
        q, k, v, shares = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for row in range(len(q)):
            key, value = (_repeated(each[row], q.shape[1]) for each in (k, v))
            share, d_row = shares[row], d_out[row]
            d_share = d_row @ value.transpose(1, 2)
            d_scores = torch.ops.aten._softmax_backward_data(d_share, share, -1, share.dtype)
            dq[row] = (d_scores @ key).mul_(scale)
            dk[row] = _added(d_scores.transpose(1, 2) @ q[row], len(dk[row])).mul_(scale)
            dv[row] = _added(share.transpose(1, 2) @ d_row, len(dv[row]))
        return dq, dk, dv, None


def _repeated(heads: torch.Tensor, count: int) -> torch.Tensor:
    """[G, S, D] as [count, S, D]: each head for the queries that share it."""
    return heads.repeat_interleave(count // len(heads), 0)


def _added(heads: torch.Tensor, count: int) -> torch.Tensor:
    """[H, S, D] as [count, S, D]: what `_repeated` does, backwards."""
    return heads.view(count, -1, *heads.shape[1:]).sum(1)


class _Norm(torch.autograd.Function):
    """Root-mean-square norm over the last dimension of x, float32; its result has `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = size.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        dy = outputs[0].to(x.dtype)
        normal = x * inverse
        d_weight = (dy * normal).flatten(0, -2).sum(0)
        d_normal = dy * weight
        along = (d_normal * normal).mean(-1, keepdim=True)
        return d_normal.addcmul_(normal, along, value=-1).mul_(inverse), d_weight, None, None


class _NextToken(torch.autograd.Function):
    """Mean negative log-likelihood of `targets` [T] after x [T, H] with the head [V, H], chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        dx, d_head = torch.empty_like(x), torch.zeros_like(head, dtype=torch.float32)
        for at in range(0, len(x), CHUNK):
            part = slice(at, at + CHUNK)
            logits = F.linear(x[part], head).float()
            total += F.cross_entropy(logits, targets[part], reduction="sum")
            share = torch.softmax(logits, -1)
            share[torch.arange(len(share)), targets[part]] -= 1
            share = share.to(x.dtype)
            torch.mm(share, head, out=dx[part])
            d_head += share.T @ x[part]
        ctx.save_for_backward(dx, d_head.div_(len(x)).to(head.dtype))
        return total / len(x)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, d_head = ctx.saved_tensors
        return dx * (outputs[0] / len(dx)).to(dx.dtype), d_head * outputs[0].to(d_head.dtype), None


def experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """What the chosen experts [T, K] make of x [T, H], weighted and added up; matrices as the stock class has them."""
    found: torch.Tensor = _Experts.apply(x, chosen, weights, gate_up, down)
    return found


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of q [B, H, S, D] on k and v [B, G, S, D] with `mask` [S, S] added to the scores."""
    found: torch.Tensor = _Attention.apply(q, k, v, mask)
    return found


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
    """x over its root mean square, times weight, in `dtype`."""
    found: torch.Tensor = _Norm.apply(x, weight, epsilon, dtype)
    return found


def next_token_loss(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean negative log-likelihood of `targets` [T] after the final hidden states [T, H]."""
    found: torch.Tensor = _NextToken.apply(x, head, targets)
    return found
