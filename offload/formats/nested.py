"""int8>int4>int2: one stored form whose prefixes are usable, as in D2MoE (2504.15299) and SliceMoE (2512.12990).

A group of 64 inputs of one output has a step and a middle. Its 8-bit codes q mean middle + step * (q - 127.5). The
codes are stored as planes: their 2 high bits, the next 2, the low 4. Without the lowest s bits, q >> s means the
middle of the values it may stand for, which is the same formula with a coarser step:

    weight = middle + shrink * step * 2**s * ((q >> s) - (2**(8 - s) - 1) / 2)

The papers decode at the lower edge instead, with a zero point shifted like the codes. `shrink` accounts for weights
being denser near the middle; see SHRINK.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from offload.formats.base import Field, Fields, Format
from offload.layout import align

GROUP = 64  # inputs that share a step and a middle
ROWS = 64  # outputs whose codes lie together
BITS = {"nested8": 8, "nested4": 4, "nested2": 2}
SHRINK = {8: 1.0, 4: 1.0, 2: 1.0}


class Nested(Format):
    """Fields, with N and K the shape rounded up to multiples of 64:

    - `groups` bfloat16 [K/64, N, 2]: step and middle.
    - `high` uint8 [N/64, K/2, 32]: the 2 high bits. Byte [b, i, j] holds those of four codes; with rows r = 64b + j and
      r + 32 and inputs c = i and i + K/2: (r, c) in bits 2-3, (r+32, c) in 6-7, (r, c + K/2) in 0-1, (r+32, c + K/2)
      in 4-5.
    - `next` uint8 [N/64, K/2, 32]: the next 2 bits, (r, c) in bits 0-1, (r+32, c) in 4-5, (r, c + K/2) in 2-3,
      (r+32, c + K/2) in 6-7.
    - `low` uint8 [N/64, K, 32]: the 4 low bits; byte [b, i, j] has those of (r, c) in bits 0-3, of (r+32, c) in 4-7.

    So (high & 0xCC) | (next & 0x33) are the codes' upper halves for one half of the inputs, laid out like `low`, and
    with both shifted by two they are those for the other half.
    """

    name = "nested"
    title = "int8>int4>int2"
    levels = ("nested8", "nested4", "nested2")

    def fields(self, n: int, k: int) -> list[tuple[Field, ...]]:
        n, k = align(n, ROWS), align(k, GROUP)
        groups = Field("groups", torch.bfloat16, (k // GROUP, n, 2))
        plane = (n // ROWS, k // 2, 32)
        return [
            (groups, Field("high", torch.uint8, plane)),
            (Field("next", torch.uint8, plane),),
            (Field("low", torch.uint8, (n // ROWS, k, 32)),),
        ]

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        n, k = weight.shape
        weight = weight.float()
        weight = pad(weight.unsqueeze(0), (0, -k % GROUP), mode="replicate")[0]  # does not change a group's range
        weight = pad(weight, (0, 0, 0, -n % ROWS))
        n, k = weight.shape
        grouped = weight.view(n, k // GROUP, GROUP)
        low, high = grouped.aminmax(dim=2, keepdim=True)
        middle = ((low + high) / 2).to(torch.bfloat16)
        # Both are rounded before the codes are made, so that their rounding costs nothing but a wider step.
        widest = (high - middle.float()).maximum(middle.float() - low)
        step = (widest / 127.5).to(torch.bfloat16)
        codes = (grouped - middle.float()) / step.float() + 127.5
        codes = codes.nan_to_num_(127.5).round_().clamp_(0, 255).to(torch.uint8).view(n, k)
        groups = torch.stack((step, middle), dim=2).view(n, k // GROUP, 2).transpose(0, 1).contiguous()
        return {"groups": groups} | _planes(codes)

    def decode(self, fields: Fields, n: int, k: int, level: str, dtype: torch.dtype) -> torch.Tensor:
        bits = BITS[level]
        codes = decode_codes(fields, n, k, level)
        step, middle = fields["groups"].float().transpose(0, 1).unbind(2)  # [N, K/64]
        step = step * (SHRINK[bits] * 2 ** (8 - bits))
        offset = middle - step * ((2**bits - 1) / 2)
        weight = codes.float() * _per_input(step, n, k) + _per_input(offset, n, k)
        return weight.to(dtype)

    def linear(self, x: torch.Tensor, fields: Fields, n: int, k: int, level: str) -> torch.Tensor:
        return torch.mm(x, self.decode(fields, n, k, level, x.dtype).t())


def decode_codes(fields: Fields, n: int, k: int, level: str) -> torch.Tensor:
    """The codes [n, k], uint8, of the stored fields: the 8-bit ones without the bits that `level` does not have."""
    bits = BITS[level]
    high = fields["high"]
    codes = torch.cat([high >> 2 & 0x33, high & 0x33], dim=1) if bits == 2 else upper_halves(high, fields["next"])
    codes = torch.cat([codes & 15, codes >> 4], dim=2)  # [N/64, K, 64]
    if bits == 8:
        low = fields["low"]
        codes = codes << 4 | torch.cat([low & 15, low >> 4], dim=2)
    return codes.transpose(1, 2).reshape(-1, codes.shape[1])[:n, :k]


def upper_halves(high: torch.Tensor, next_: torch.Tensor) -> torch.Tensor:
    """The 4 high bits of all codes [N/64, K, 32], laid out like the low ones, from the two planes that hold them."""
    first = (high & 0xCC) | (next_ & 0x33)
    second = (high & 0x33) << 2 | (next_ >> 2) & 0x33
    return torch.cat([first, second], dim=1)


def _planes(codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """codes [N, K], uint8, as planes."""
    n, k = codes.shape
    blocks = codes.view(n // ROWS, ROWS, k).transpose(1, 2).contiguous()  # [N/64, K, 64]
    halves = blocks >> 4
    halves = halves[..., :32] | halves[..., 32:] << 4
    first, second = halves[:, : k // 2], halves[:, k // 2 :]
    low = blocks & 15
    return {
        "high": (first & 0xCC) | (second & 0xCC) >> 2,
        "next": (first & 0x33) | (second & 0x33) << 2,
        "low": low[..., :32] | low[..., 32:] << 4,
    }


def _per_input(groups: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """[N, K/64] -> [n, k]."""
    return groups.repeat_interleave(GROUP, dim=1)[:n, :k]
