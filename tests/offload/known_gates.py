"""Gates of experts that kernels know, and what they do in double precision."""

from __future__ import annotations

import torch

from offload.formats import Gate
from offload.formats.gate import SILU

GATES = [SILU, Gate(0.7, 1.702, 1.0, interleaved=True), Gate(0.7, 1.702, 1.0), Gate(0.7)]


def gated(both: torch.Tensor, how: Gate) -> torch.Tensor:
    """What is between an expert's products: [T, 2 * inner] -> [T, inner]."""
    gate, up = (both[:, ::2], both[:, 1::2]) if how.interleaved else both.chunk(2, dim=1)
    gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit)
    return (up + how.plus) * gate * torch.sigmoid(how.alpha * gate)


def biases_of(*sizes: int) -> list[torch.Tensor]:
    """One of each size, bfloat16."""
    return [torch.randn(size, generator=torch.Generator().manual_seed(size)).bfloat16() for size in sizes]
