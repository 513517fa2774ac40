"""Norms and the next token's loss, forward and backward by hand: little is kept for the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

CHUNK = 512  # tokens whose scores over the vocabulary are held at once


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = size.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        found: torch.Tensor = (x * inverse).mul_(weight).to(dtype)
        return found

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
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        dx, d_head = torch.empty_like(x), torch.zeros_like(head, dtype=torch.float32)
        for at in range(0, len(x), CHUNK):
            part = slice(at, at + CHUNK)
            said = F.log_softmax(F.linear(x[part], head).float(), -1)
            total += F.nll_loss(said, targets[part], reduction="sum")
            share = said.exp_()
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


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
    """x, float32, over its root mean square, times weight, in `dtype`."""
    found: torch.Tensor = _Norm.apply(x, weight, epsilon, dtype)
    return found


def next_token_loss(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean negative log-likelihood of `targets` [T] after final hidden states [T, H] with the head [V, H]."""
    found: torch.Tensor = _NextToken.apply(x, head, targets)
    return found
