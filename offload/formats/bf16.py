"""Plain bfloat16, for weights that a model keeps at more bits."""

from __future__ import annotations

import torch

from offload.formats.base import Field, Fields, Format


class BF16(Format):
    """weight bfloat16 [n, k]."""

    name = "bf16"
    title = "bf16"
    levels = ("bf16",)

    def fields(self, n: int, k: int) -> list[tuple[Field, ...]]:
        return [(Field("weight", torch.bfloat16, (n, k)),)]

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": weight.to(torch.bfloat16)}

    def decode(self, fields: Fields, n: int, k: int, level: str, dtype: torch.dtype) -> torch.Tensor:
        return fields["weight"].to(dtype)

    def linear(self, x: torch.Tensor, fields: Fields, n: int, k: int, level: str) -> torch.Tensor:
        return torch.mm(x.to(torch.bfloat16), fields["weight"].t()).to(x.dtype)
