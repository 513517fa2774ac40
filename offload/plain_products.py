"""One row times a plain matrix: torch's `mv` reads weights faster than its `mm`, and is used where no bit differs.

On the CPU where this was measured `mm` of one row with a bfloat16 matrix reaches four fifths of the memory's bandwidth,
and `mv` all of it. Whether both add in the same order depends on the processor, the dtype and the shape, so it is
tried, once for each shape, with numbers that tell: where the order differs, about one bfloat16 output in ten thousand
does, and nearly every float32 one.
"""

from __future__ import annotations

import functools

import torch

_OUTPUTS = 2**17  # compared at least; with one in 10,000 wrong, all are right once in half a million trials


def row_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """x [1, k], weight [n, k] -> out [1, n], the bits of `torch.mm(x, weight.t())`."""
    if weight.device.type == "cpu" and mv_is_exact(weight.dtype, *weight.shape):
        torch.mv(weight, x[0], out=out[0])
    else:
        torch.mm(x, weight.t(), out=out)


@functools.cache
def mv_is_exact(dtype: torch.dtype, n: int, k: int) -> bool:
    """Whether `mv` gives the bits of `mm` for one row and a matrix [n, k] on this CPU: a trial of a split second."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float32).to(dtype)
    for _ in range(-(-_OUTPUTS // n)):
        x = torch.randn(1, k, generator=generator, dtype=torch.float32).to(dtype)
        if not torch.equal(torch.mv(weight, x[0]), torch.mm(x, weight.t())[0]):
            return False
    return True
