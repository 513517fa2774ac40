"""8 bits: symmetric, one scale per output row, weight only."""

from __future__ import annotations

import torch

from offload.formats.base import Field, Fields, Format


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
        return torch.mm(x, self.decode(fields, n, k, level, x.dtype).t())
