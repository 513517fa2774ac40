"""One token's router in one call of our kernel: scores, the experts that have the highest, and their weights."""

from __future__ import annotations

import struct

import torch

from offload.formats.cpu import native
from offload.formats.cpu import threads as own_threads
from offload.formats.cpu.room import room

_JOB = struct.Struct("=13q")


def route(
    x: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    *,
    of_chosen: bool,
    scaled: bool,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [1, H] and weight [E, H], bfloat16, H a multiple of 32 -> scores [1, E], and of the `top_k` highest weights
    [1, K] of `dtype`, bfloat16 or float32, and which experts' they are [1, K], the highest first.

    Weights are the softmax of all scores, or with `of_chosen` of those chosen; with `scaled` their sum is made 1. bias
    [E], bfloat16, is added to scores.
    """
    experts, k = weight.shape
    scores = torch.empty(1, experts, dtype=torch.bfloat16, device="cpu")
    weights = torch.empty(1, top_k, dtype=dtype, device="cpu")
    chosen = torch.empty(1, top_k, dtype=torch.int64, device="cpu")
    words = 2 * k + 2 * experts + 32
    memory = room(4 * (words + top_k)).data_ptr()
    is_rounded = dtype == torch.bfloat16
    job = _JOB.pack(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        scores.data_ptr(),
        chosen.data_ptr(),
        memory + 4 * words if is_rounded else weights.data_ptr(),
        weights.data_ptr() if is_rounded else 0,
        memory,
        experts,
        k,
        top_k,
        of_chosen,
        scaled,
    )
    lib = native.library()
    assert lib is not None
    lib.route(job, own_threads.count())
    return scores, weights, chosen
