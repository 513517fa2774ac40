"""8 bits: symmetric, one scale per output row, weight only."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from offload.formats.base import Field, Fields, Format
from offload.formats.cpu.features import has_amx
from offload.formats.cpu.plain import is_faster, products, serves


class Int8(Format):
    """codes int8 [n, k] and scales bfloat16 [n]: weight = code * scale.

    The scale is rounded before the codes are made, so that its rounding costs nothing.
    """

    name = "int8"
    title = "int8"
    levels = ("int8",)

    def fields(self, n: int, k: int) -> list[tuple[Field, ...]]:
        return [(Field("codes", torch.int8, (n, k)), Field("scales", torch.bfloat16, (n,)))]

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = weight.float()
        scales = (weight.abs().amax(dim=1) / 127).to(torch.bfloat16)
        codes = weight / scales.float().unsqueeze(1)
        codes = codes.nan_to_num_(0).round_().clamp_(-127, 127).to(torch.int8)
        return {"codes": codes, "scales": scales}

    def decode(self, fields: Fields, n: int, k: int, level: str, dtype: torch.dtype) -> torch.Tensor:
        return (fields["codes"].float() * fields["scales"].float().unsqueeze(1)).to(dtype)

    def linear(self, x: torch.Tensor, fields: Fields, n: int, k: int, level: str) -> torch.Tensor:
        if _is_ours(x.device.type, k):
            return self.linear_each(x, [fields], n, k, level)
        codes, scales = fields["codes"], fields["scales"]
        if x.dtype == torch.float16:  # too narrow for the scales of small weights
            return self.linear(x.float(), fields, n, k, level).to(x.dtype)
        scales = scales.to(x.dtype)
        # The kernel reads past the end of other shapes.
        if x.device.type == "cpu" and n % 16 == 0 and k % 64 == 0 and len(x) <= _most_rows():
            y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes, scales)
            return y
        # Codes are exact in bfloat16. Scaling what comes out is cheaper than scaling the weights.
        return torch.mm(x, codes.to(x.dtype).t()).mul_(scales)

    def linear_each(self, x: torch.Tensor, matrices: Sequence[Fields], n: int, k: int, level: str) -> torch.Tensor:
        if _is_ours(x.device.type, k):
            return products(x, [fields["codes"] for fields in matrices], [fields["scales"] for fields in matrices])
        return super().linear_each(x, matrices, n, k, level)

    def own_rows(self, n: int, k: int, level: str, device_type: str) -> int:
        return sys.maxsize if _is_ours(device_type, k) else 0


def _is_ours(device_type: str, k: int) -> bool:
    return device_type == "cpu" and is_faster() and serves(torch.int8, k)


def _most_rows() -> int:
    """Up to how many rows of x torch's 8-bit kernel is the faster way.

    Measured on Qwen3-30B-A3B's shapes with AMX; without it bfloat16 products take about twice as long.
    """
    return 16 if has_amx() else 24
