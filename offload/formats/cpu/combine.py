"""What each token's experts gave, weighted and added up in one pass of our kernel; torch makes two, or four."""

from __future__ import annotations

import torch

from offload.formats.cpu import native
from offload.formats.cpu import threads as own_threads

_MOST = 16  # torch adds up so many one after the other, and more of them otherwise


def serves(y: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether the kernel takes them: see `combine`."""
    return (
        y.dtype is torch.bfloat16
        and weights.dtype in (torch.bfloat16, torch.float32)
        and y.device.type == weights.device.type == "cpu"
        and y.is_contiguous()
        and weights.is_contiguous()
        and y.shape[-1] % 8 == 0
        and weights.shape[-1] <= _MOST
        and not (y.requires_grad or weights.requires_grad)
        and bool(native.level())
    )


def combine(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """y [T * K, H] bfloat16, H a multiple of 8, and weights [T, K], K at most 16 -> [T, H] bfloat16.

    The bits are those of `(y * weights).sum(1)` in torch: with bfloat16 weights products are rounded, with float32 ones
    the sum alone.
    """
    tokens, top_k = weights.shape
    out = torch.empty(tokens, y.shape[-1], dtype=torch.bfloat16, device="cpu")
    lib = native.library()
    assert lib is not None
    rounds = weights.dtype is torch.bfloat16
    threads = own_threads.count() if tokens > 1 else 1
    lib.combine(y.data_ptr(), weights.data_ptr(), rounds, tokens, top_k, y.shape[-1], out.data_ptr(), threads)
    return out
