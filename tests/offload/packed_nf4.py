"""NF4 matrices as our kernel takes them, and what they mean."""

from __future__ import annotations

import torch

from offload.formats import FORMATS, Fields
from offload.formats.cpu.nf4 import unpack_codes
from offload.formats.nf4 import code_int16

NF4 = FORMATS["nf4"]


def packed(weight: torch.Tensor) -> Fields:
    """weight [n, k], packed for this CPU."""
    n, k = weight.shape
    fields = NF4.packed(n, k, "nf4", "cpu")
    assert fields is not None
    out = {field.name: torch.empty(field.shape, dtype=field.dtype) for field in fields}
    NF4.pack(NF4.encode(weight), n, k, "nf4", out)
    return out


def codes(fields: Fields) -> torch.Tensor:
    """[n, k]"""
    n, half = fields["codes"].shape
    pairs = unpack_codes(fields["codes"]).view(n, half)
    return torch.stack((pairs >> 4, pairs & 15), dim=2).view(n, 2 * half).int()


def scales(fields: Fields) -> torch.Tensor:
    """Of every weight: float64 [n, k]."""
    tiles, blocks, rows = fields["absmax"].shape
    by_row = fields["absmax"].double().transpose(1, 2).reshape(tiles * rows, blocks)
    return by_row.repeat_interleave(64, dim=1)


def meaning(fields: Fields) -> torch.Tensor:
    """The matrix in float64: levels are 4096ths, scales are bfloat16."""
    return code_int16().double()[codes(fields)] / 4096 * scales(fields)
