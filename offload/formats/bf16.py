"""Plain bfloat16, for weights that a model keeps at more bits."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from offload.formats.base import Field, Fields, Format
from offload.formats.cpu.plain import is_faster, products, serves


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
        inner = x.to(torch.bfloat16)
        if _is_ours(x.device.type, k):
            return products(inner, [fields["weight"]]).to(x.dtype)
        return torch.mm(inner, fields["weight"].t()).to(x.dtype)

    def linear_each(self, x: torch.Tensor, matrices: Sequence[Fields], n: int, k: int, level: str) -> torch.Tensor:
        if _is_ours(x.device.type, k):
            return products(x.to(torch.bfloat16), [fields["weight"] for fields in matrices]).to(x.dtype)
        return super().linear_each(x, matrices, n, k, level)

    def own_rows(self, n: int, k: int, level: str, device_type: str) -> int:
        return sys.maxsize if _is_ours(device_type, k) else 0


def _is_ours(device_type: str, k: int) -> bool:
    return device_type == "cpu" and is_faster() and serves(torch.bfloat16, k)
