"""Products with matrices whose outputs lie side by side, by our own kernel: plain ones [k, n], and nested ones.

As `offload.formats.cpu.plain` and for the same processors: weights are widened where they are used, sums are float32,
and a row's bits depend neither on the rows beside it nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offload.formats.cpu import native
from offload.formats.cpu.jobs import multiply

_INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NESTED4, _NESTED8, _NESTED3 = 4, 5, 6
_OUTPUTS = 64  # n is a multiple of them
_BLOCK = 64  # inputs that are summed at a time

FOUR_BITS, THREE_BITS = 8.0, 7.5
"""The code of 4 bits that means zero, where all of them are known, and where the last one is missing, and 0."""

Planes = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]
"""A nested matrix: groups [ceil(k/64), n, 2], the upper codes, and the lower ones [n/64, k, 32] if it has 8 bits."""


def serves(dtype: torch.dtype, n: int) -> bool:
    """Whether the kernel multiplies plain matrices of `dtype` with `n` outputs."""
    return dtype in (torch.bfloat16, torch.float16) and n % _OUTPUTS == 0


def products(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """x with plain matrices [k, n], which `serves` allows, -> in x's dtype: float32, bfloat16 or float16.

    Of one matrix: x [m, k] -> [m, n]. Of several, a row of each: x [1, k], or [len(matrices), k] -> [len(matrices), n].
    """
    addresses = [(matrix.data_ptr(), 0, 0) for matrix in matrices]
    return _products(x, addresses, matrices[0].shape[1], _INPUTS[matrices[0].dtype], 0)


def nested_products(x: torch.Tensor, matrices: Sequence[Planes], middle: float = FOUR_BITS) -> torch.Tensor:
    """The same with nested matrices, whose n is their padded one; `middle` is one of the two above."""
    addresses = [
        (upper.data_ptr(), 0 if low is None else low.data_ptr(), groups.data_ptr()) for groups, upper, low in matrices
    ]
    groups, upper, low = matrices[0]
    kind = _NESTED8 if low is not None else _NESTED4 if middle == FOUR_BITS else _NESTED3
    return _products(x, addresses, groups.shape[1], kind, upper.shape[1])


def _products(
    x: torch.Tensor, matrices: Sequence[tuple[int, int, int]], n: int, kind: int, rows_of_codes: int
) -> torch.Tensor:
    width = -(-x.shape[1] // _BLOCK) * _BLOCK
    lib = native.library()
    assert lib is not None
    return multiply(lib.columns_products, x, matrices, n, width, _INPUTS[x.dtype], kind, more=(rows_of_codes,))
