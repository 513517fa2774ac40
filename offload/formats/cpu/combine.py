"""What each token's experts gave, weighted and added up in one pass of our kernel; torch makes two, or four."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from itertools import chain

import torch

from offload.formats.cpu import native
from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.routing import TokenRouter

MOST = 16
"""Torch adds up so many one after the other, and more of them otherwise."""

_NUMBERS = array("q", range(MOST))
_ROW_EACH = tuple(struct.pack("3q", _NUMBERS.buffer_info()[0] + 8 * i, 1, i) for i in range(MOST))


def row_each(places: Sequence[bytes]) -> array[int]:
    """What a kernel is told of one token's experts: behind the place of each the address of the number of its row, that
    it is one, and how many come before it."""
    return array("q", b"".join(chain.from_iterable(zip(places, _ROW_EACH, strict=False))))


def serves(y: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether the kernel takes them: see `combine`."""
    return (
        y.dtype is torch.bfloat16
        and weights.dtype in (torch.bfloat16, torch.float32)
        and y.device.type == weights.device.type == "cpu"
        and y.is_contiguous()
        and weights.is_contiguous()
        and y.shape[-1] % 8 == 0
        and weights.shape[-1] <= MOST
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
    rounds = weights.dtype is torch.bfloat16
    told = job(y.data_ptr(), weights.data_ptr(), 0, out.data_ptr(), tokens, top_k, y.shape[-1], rounds=rounds)
    lib = native.library()
    assert lib is not None
    lib.combine(told.buffer_info()[0], own_threads.count() if tokens > 1 else 1)
    return out


def token_sum(y: int, router: TokenRouter, before: torch.Tensor) -> tuple[torch.Tensor, array[int]]:
    """Of one token: where `before` [..., H] and the sum of what its experts gave go, and what the kernel is told.

    `y` is the address of [K, H]; the weights are the router's.
    """
    out, count = torch.empty_like(before), len(router.experts)
    places = y, router.weights_at, before.data_ptr(), out.data_ptr()
    return out, job(*places, 1, count, before.numel(), rounds=router.rounds)


def job(y: int, weights: int, before: int, out: int, tokens: int, top_k: int, n: int, *, rounds: bool) -> array[int]:
    """What the kernel is told: see `combine`. Tensors are addresses. The sums are added to `before` [T, n], if it is
    none of 0. `rounds`: weights are bfloat16."""
    return array("q", (y, weights, before, out, tokens, top_k, n, rounds))
