"""One row times a plain matrix: torch's `mv` reads weights faster than its `mm`, and is used where no bit differs.

On the CPU where this was measured `mm` of one row with a bfloat16 matrix reaches four fifths of the memory's bandwidth,
and `mv` all of it. Whether both add in the same order depends on the processor, the dtype and the shape, so it is
tried, once for each shape, with numbers that tell: where the order differs, about one bfloat16 output in ten thousand
does, and nearly every float32 one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import repeat

import torch
from torch import nn

_OUTPUTS = 2**17  # compared at least; with one in 10,000 wrong, all are right once in half a million trials
_NUMBERS = 2**22  # of a matrix that is tried

_LEAST_INPUTS = 256  # with fewer `mm` is the faster one


def row_products(x: torch.Tensor, weights: Sequence[torch.Tensor], transposed: bool) -> torch.Tensor:
    """x [1, k] or [len(weights), k] -> [len(weights), n]: a row for each of `weights` [n, k], [k, n] if `transposed`.

    The bits are those of `torch.mm` for each row.
    """
    first = weights[0]
    n, k = reversed(first.shape) if transposed else first.shape
    y = x.new_empty(len(weights), n)
    if not transposed and first.device.type == "cpu" and k >= _LEAST_INPUTS and mv_is_exact(first.dtype, n, k):
        vectors = x.unbind(0) if len(x) > 1 else repeat(x[0], len(weights))
        for vector, weight, out in zip(vectors, weights, y.unbind(0), strict=True):
            torch.mv(weight, vector, out=out)
        return y
    rows = x.split(1) if len(x) > 1 else repeat(x, len(weights))
    for row, weight, out in zip(rows, weights, y.split(1), strict=True):
        torch.mm(row, weight if transposed else weight.t(), out=out)
    return y


class RowLinear(nn.Linear):
    """A linear layer without bias that multiplies one row by `mv`, if that gives the bits of its own product."""

    _mv: bool | None = None
    """Whether it does; None until the first row comes, which is computed both ways."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] -> [..., n]."""
        if self._mv is False or x.numel() != self.in_features:
            return super().forward(x)
        if self._mv is None:
            y = super().forward(x)
            exact = mv_is_exact(self.weight.dtype, *self.weight.shape)
            self._mv = exact and torch.equal(torch.mv(self.weight, x.reshape(-1)), y.reshape(-1))
            return y
        return torch.mv(self.weight, x.reshape(-1)).view(*x.shape[:-1], self.out_features)


def use_rows(model: nn.Module) -> None:
    """Make the plain linear layers of `model` that lie on the CPU such ones; their parameters and hooks stay."""
    for module in model.modules():
        if (
            type(module) is nn.Linear
            and module.bias is None
            and module.weight.device.type == "cpu"
            and module.in_features >= _LEAST_INPUTS
        ):
            module.__class__ = RowLinear


@functools.cache
def mv_is_exact(dtype: torch.dtype, n: int, k: int) -> bool:
    """Whether `mv` gives the bits of `mm` for one row and a matrix [n, k] on this CPU: a trial of a split second.

    Of large matrices it tries one with fewer rows, which takes little memory.
    """
    n = min(n, max(_NUMBERS // k, 1))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float32).to(dtype)
    for _ in range(-(-_OUTPUTS // n)):
        x = torch.randn(1, k, generator=generator, dtype=torch.float32).to(dtype)
        if not torch.equal(torch.mv(weight, x[0]), torch.mm(x, weight.t())[0]):
            return False
    return True
