"""How a product is given to our kernels in C: addresses, sizes, and room for x as they want it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch

from offload.formats.cpu import threads as own_threads

ROOM = 2**19  # words that x may take as a kernel wants it: 2 MiB, whatever a prompt's length


def multiply(
    kernel: Callable[..., None],
    x: torch.Tensor,
    matrices: Sequence[Sequence[int]],
    n: int,
    width: int,
    *told: int,
    more: Sequence[int] = (),
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x with matrices [n, k], whose parts lie at the addresses `matrices`, -> in x's dtype. Of one matrix: x [m, k] ->
    [m, n]. Of several, a row of each: x [1, k], or [len(matrices), k] -> [len(matrices), n].

    A row of x takes `width` words of room. `kernel` is `told` something beside that, and `more` at each product's end.
    What one matrix gives is written to `out`, if there is one. It computes on `own_threads.count()` threads.
    """
    x = x.contiguous()
    rows, k = x.shape
    count = len(matrices)
    m = rows if count == 1 else 1
    y = torch.empty(m * count, n, dtype=x.dtype, device="cpu") if out is None else out
    if not rows:
        return y
    # Of a long prompt so many rows at a time that they have room.
    most = max(ROOM // width, 1) if m > 1 else m
    room = torch.empty(min(rows, most * count) * width, dtype=torch.int32, device="cpu")
    from_, to, x_step, y_step = x.data_ptr(), y.data_ptr(), x.itemsize * k * (rows > m), y.itemsize * n * m
    row_bytes = y.itemsize * y.stride(0)
    for first in range(0, m, most):
        own, x_at, y_at = min(most, m - first), from_ + first * x.itemsize * k, to + first * row_bytes
        job = array("q")  # of each product the addresses of x, its matrix and y, and m, n, k
        for i, matrix in enumerate(matrices):
            job.extend((x_at + i * x_step, *matrix, y_at + i * y_step, own, n, k, *more))
        kernel(job.buffer_info()[0], count, rows == m, *told, room.data_ptr(), own_threads.count())
    return y
