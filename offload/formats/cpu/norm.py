"""RMSNorm of bfloat16 rows by our own kernel: one pass over them, where torch makes seven."""

from __future__ import annotations

import torch

from offload.formats.cpu import native
from offload.formats.cpu import threads as own_threads


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes them: see `rms_norm`."""
    return (
        bool(native.level())
        and x.dtype is weight.dtype is torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and x.shape[-1] == len(weight)
        and len(weight) % 8 == 0
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, twice: bool) -> torch.Tensor:
    """x [..., n] over the root of its mean square, times weight [n].

    With `twice` numbers are rounded to bfloat16 before they are weighted, too.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    n = len(weight)
    lib = native.library()
    assert lib is not None
    lib.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // n, n, epsilon, twice, own_threads.count())
    return y
