"""Products with bfloat16, float16 and 8-bit matrices by our own kernel, where torch's is slow.

On processors without bfloat16 products torch multiplies bfloat16 at a quarter of its float32's speed. The kernel widens
weights in registers and sums float32, so it rounds otherwise than torch, and no less exactly; it needs no copy of a
matrix. A row's bits depend neither on the rows beside it nor on the number of threads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from offload.formats.cpu import native
from offload.formats.cpu.features import has_amx
from offload.formats.cpu.jobs import multiply

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_INPUTS = 32  # k is a multiple of them
_APART = 16  # floats between two widened rows


def is_faster() -> bool:
    """Whether this CPU has the kernel and no instructions for bfloat16 products: then torch's are slower."""
    return native.NONE < native.level() < native.BF16


def most_rows() -> int:
    """Of how many rows at most the kernel's products are faster than torch's: of one where torch has instructions for
    several, as one row reads weights faster."""
    if is_faster():
        return sys.maxsize
    return 1 if native.level() else 0


def most_rows_of_experts() -> int:
    """With how many rows at most whole experts are faster in our kernel than with torch's products.

    So few rows take as long as weights take to come from memory, of which the kernel makes more use.
    """
    if is_faster():
        return sys.maxsize
    return 8 if has_amx() else 16


def serves(dtype: torch.dtype, k: int) -> bool:
    """Whether the kernel multiplies matrices of `dtype` with `k` inputs."""
    return dtype in (torch.bfloat16, torch.float16, torch.int8) and k % _INPUTS == 0


def products(
    x: torch.Tensor, matrices: Sequence[torch.Tensor], scales: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """x with matrices [n, k], which `serves` and the CPU's level allow, -> in x's dtype. Of one matrix: x [m, k] ->
    [m, n]. Of several, a row of each: x [1, k], or [len(matrices), k] -> [len(matrices), n].

    x is float32, bfloat16 or float16; `scales`, bfloat16 [n], are those of 8-bit matrices' rows.
    """
    n, k = matrices[0].shape
    places = [(matrix.data_ptr(), 0 if scales is None else scales[i].data_ptr()) for i, matrix in enumerate(matrices)]
    lib = native.library()
    assert lib is not None
    return multiply(lib.plain_products, x, places, n, k + _APART, _KINDS[x.dtype], _KINDS[matrices[0].dtype])
