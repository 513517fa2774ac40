"""NF4: 16 levels spaced like a normal distribution (QLoRA, arXiv:2305.14314), in bitsandbytes' own layout."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from offload.formats.base import Field, Fields, Format

BLOCK = 64


@functools.cache
def bitsandbytes() -> Any:
    """The module `bitsandbytes.functional`, imported without the line it logs about an optional kernel."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    finally:
        logger.setLevel(level)
    return bitsandbytes.functional


class NF4(Format):
    """codes uint8 [ceil(n*k/2)] and absmax float32 [ceil(n*k/64)], over the flattened matrix.

    The high nibble of a byte is the even element. Exactly what `quantize_4bit(weight, quant_type="nf4",
    blocksize=64)` returns.
    """

    name = "nf4"
    title = "nf4"
    levels = ("nf4",)

    def fields(self, n: int, k: int) -> list[tuple[Field, ...]]:
        codes = Field("codes", torch.uint8, (-(-n * k // 2),))
        return [(codes, Field("absmax", torch.float32, (-(-n * k // BLOCK),)))]

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, state = bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
        return {"codes": codes.view(-1), "absmax": state.absmax}

    def decode(self, fields: Fields, n: int, k: int, level: str, dtype: torch.dtype) -> torch.Tensor:
        bitsandbytes()
        codes = fields["codes"].view(-1, 1)
        weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            codes, fields["absmax"], BLOCK, "nf4", (n, k), dtype
        )
        return weight

    def linear(self, x: torch.Tensor, fields: Fields, n: int, k: int, level: str) -> torch.Tensor:
        return torch.mm(x, self.decode(fields, n, k, level, x.dtype).t())
