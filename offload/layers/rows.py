"""One row times a plain matrix: torch's `mv` reads weights faster than its `mm`, and is used where no bit differs.

On the CPU where this was measured `mm` of one row with a bfloat16 matrix reaches four fifths of the memory's bandwidth,
and `mv` all of it. Whether both add in the same order depends on the processor, the dtype, the shape and the number of
threads, so it is tried, once for each, with numbers that tell: where the order differs, about one bfloat16 output in
ten thousand does, and nearly every float32 one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import repeat

import torch
from torch import nn

from offload.checkpoint.parameter import align
from offload.layers.autocast import autocasts

_OUTPUTS = 2**17  # compared at least; with one in 10,000 wrong, all are right once in half a million trials
_NUMBERS = 2**22  # of a matrix that is tried: of larger ones, fewer rows
_LEAST_INPUTS = 256  # with fewer `mm` is the faster one
_LEAST_OUTPUTS = 64  # with fewer a trial takes long, and nothing is gained

_verdicts: dict[tuple[torch.dtype, int, int, int], bool] = {}


def row_products(x: torch.Tensor, weights: Sequence[torch.Tensor], transposed: bool) -> torch.Tensor:
    """x [1, k] or [len(weights), k] -> [len(weights), n]: a row for each of `weights` [n, k], [k, n] if `transposed`.

    The bits are those of `torch.mm` for each row.
    """
    first = weights[0]
    n = first.shape[1] if transposed else first.shape[0]
    # Every row aligned as a tensor by itself is: `mm` may give other last bits elsewhere.
    y = x.new_empty(len(weights), align(n * x.itemsize) // x.itemsize)[:, :n]
    if not transposed and may_use_mv(first, x[0]):
        vectors = x.unbind(0) if len(x) > 1 else repeat(x[0], len(weights))
        for vector, weight, out in zip(vectors, weights, y.unbind(0), strict=True):
            torch.mv(weight, vector, out=out)
        return y.contiguous()
    rows = x.split(1) if len(x) > 1 else repeat(x, len(weights))
    for row, weight, out in zip(rows, weights, y.split(1), strict=True):
        torch.mm(row, weight if transposed else weight.t(), out=out)
    return y.contiguous()


class RowLinear(nn.Linear):
    """A linear layer without bias that multiplies one row by `mv`, if that gives the bits of its own product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] -> [..., n]."""
        if x.numel() == self.in_features and x.dtype == self.weight.dtype and not autocasts(x):
            vector = x.reshape(-1)
            if may_use_mv(self.weight, vector):
                return torch.mv(self.weight, vector).view(*x.shape[:-1], self.out_features)
        return super().forward(x)


def use_rows(model: nn.Module) -> None:
    """Make the plain linear layers of `model` that lie on the CPU such ones; their parameters and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = RowLinear


def may_use_mv(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `mv` gives the bits of `mm` for weight [n, k] and x [k].

    A dtype, a shape and a number of threads are tried when they first come, with these very numbers, too.
    """
    n, k = weight.shape
    key = weight.dtype, n, k, torch.get_num_threads()
    verdict = _verdicts.get(key)
    if verdict is None:
        verdict = (
            weight.device.type == "cpu"
            and n >= _LEAST_OUTPUTS
            and k >= _LEAST_INPUTS
            and mv_is_exact(*key)
            and torch.equal(torch.mv(weight, x), torch.mm(x[None], weight.t())[0])
        )
        if weight.device.type == "cpu":
            _verdicts[key] = verdict
    return verdict and weight.device.type == "cpu"


@functools.cache
def mv_is_exact(dtype: torch.dtype, n: int, k: int, threads: int) -> bool:
    """Whether they agree for random matrices [n, k], with torch's present `threads`: a trial of a split second."""
    n = min(n, max(_NUMBERS // k, 1))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float32).to(dtype)
    for _ in range(-(-_OUTPUTS // n)):
        x = torch.randn(1, k, generator=generator, dtype=torch.float32).to(dtype)
        if not torch.equal(torch.mv(weight, x[0]), torch.mm(x, weight.t())[0]):
            return False
    return True
