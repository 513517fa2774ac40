"""Products with bfloat16, float16 and 8-bit matrices by our own kernel, where torch's is slow.

On processors without bfloat16 products torch multiplies bfloat16 at a quarter of its float32's speed. The kernel widens
weights in registers and sums float32, so it rounds otherwise than torch, and no less exactly; it needs no copy of a
matrix. A row's bits depend neither on the rows beside it nor on the number of threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from offload.formats.cpu import native
from offload.formats.cpu import threads as own_threads

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_INPUTS = 32  # k is a multiple of them
_APART = 16  # floats between two widened rows
_ROOM = 2**19  # floats that x may take so: 2 MiB, whatever a prompt's length


def is_faster() -> bool:
    """Whether this CPU has the kernel and no instructions for bfloat16 products: then torch's are slower."""
    return native.NONE < native.level() < native.AVX512_BF16


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
    first, count = matrices[0], len(matrices)
    n, k = first.shape
    x = x.contiguous()
    rows = len(x)
    m = rows if count == 1 else 1
    if m > (most := max(_ROOM // (k + _APART), 1)):
        return torch.cat([products(part, matrices, scales) for part in x.split(most)])
    y = torch.empty(m * count, n, dtype=x.dtype, device="cpu")
    if not rows:
        return y
    room = torch.empty(rows * (k + _APART), dtype=torch.float32, device="cpu")
    from_, to, x_step, y_step = x.data_ptr(), y.data_ptr(), x.itemsize * k * (rows > m), y.itemsize * n * m
    job = array("q")  # of each product the addresses of x, the matrix, its scales and y, and m, n, k
    for i, matrix in enumerate(matrices):
        scale = 0 if scales is None else scales[i].data_ptr()
        job.extend((from_ + i * x_step, matrix.data_ptr(), scale, to + i * y_step, m, n, k))
    lib = native.library()
    assert lib is not None
    kinds = _KINDS[x.dtype], _KINDS[first.dtype]
    lib.plain_products(job.buffer_info()[0], count, rows == m, *kinds, room.data_ptr(), own_threads.count())
    return y
