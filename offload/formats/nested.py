"""int8>int4>int3>int2: one stored form whose prefixes are usable, as in D2MoE (2504.15299) and SliceMoE (2512.12990).

A group of 64 inputs of one output has a step and a zero. Its 8-bit codes q are stored as planes: their 2 high bits, the
third, the fourth, the low 4. What a level does not have is filled in, so that the codes q >> s of a level mean the
middle of what they may stand for, not its lower edge as in the papers. With h the 4 high bits and l the 4 low ones:

    nested8    weight = zero + step * (h - 8 + (l - 7.5) / 16)
    nested4    weight = zero + step * (h - 8)
    nested3    weight = zero + step * (h - 7.5), the missing bit of h being 0
    nested2    as nested4, the 2 missing bits of h being 10 in the lower half of the range and 01 in the upper one

(The exact middle, between 01 and 10, is no 4-bit code; of the two the one nearer the middle of the range is as good.)
On Gaussian weights the relative error is .0053, .088, .176 and .354; at the lower edges the last three would be .173,
.345 and .690, in the exact middle of two bits .352.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from offload.formats.base import Field, Fields, Format
from offload.formats.cpu.columns import FOUR_BITS, THREE_BITS, Planes, nested_products
from offload.formats.cpu.nested import fill, join, multiply
from offload.formats.cpu.plain import is_faster

GROUP = 64  # inputs that share a step and a zero
ROWS = 64  # outputs whose codes lie together
BITS = {"nested8": 8, "nested4": 4, "nested3": 3, "nested2": 2}
MIDDLE = {8: FOUR_BITS, 4: FOUR_BITS, 3: THREE_BITS, 2: FOUR_BITS}
MOST_ROWS_CUDA = 16  # rows of x that one program of the Triton kernel takes; not measured


def align(size: int, to: int) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


class Nested(Format):
    """Fields, with N = n rounded up to a multiple of 64 and K = k rounded up to an even number:

    - `groups` bfloat16 [ceil(k/64), N, 2]: step and zero.
    - `high` uint8 [N/64, K/2, 32]: the 2 high bits. Byte [b, i, j] holds those of four codes, of rows r = 64b + j and
      r + 32 and inputs i and i + K/2: (r, i) in bits 2-3, (r+32, i) in 6-7, (r, i + K/2) in 0-1 and (r+32, i + K/2)
      in 4-5.
    - `third` and `fourth` uint8 [N/64, Q, 32], Q being half of K/2, rounded up: the next bit, and the one after it.
      Let `next` [N/64, K/2, 32] have both, (r, i) in bits 0-1, (r+32, i) in 4-5, (r, i + K/2) in 2-3 and
      (r+32, i + K/2) in 6-7. Byte [b, i, j] of `third` has the odd bits of next[b, i, j] as they lie there, and those
      of next[b, i + Q, j] one place lower; of `fourth` it has the even ones, and those of i + Q one place higher.
    - `low` uint8 [N/64, K, 32]: the 4 low bits; byte [b, i, j] has those of (r, i) in bits 0-3, of (r+32, i) in 4-7.

    So (third & 0xAA) | (fourth & 0x55) is one half of `next`, and (high & 0xCC) | (next & 0x33) are the 4 high bits
    for one half of the inputs, laid out like `low`. That layout, with `groups` as they are, is what torch's 4-bit
    kernel for CPUs with AVX512 wants.

    Packed for a CPU, `upper` uint8 [N/64, K, 32] replaces `high`, `third` and `fourth`: it holds the 4 high bits.

    Unverified: on CUDA a Triton kernel computes few rows from the planes, many are a product with decoded weights.
    """

    name = "nested"
    title = "int8>int4>int3>int2"
    levels = ("nested8", "nested4", "nested3", "nested2")

    def fields(self, n: int, k: int) -> list[tuple[Field, ...]]:
        n, k = align(n, ROWS), align(k, 2)
        groups = Field("groups", torch.bfloat16, (-(-k // GROUP), n, 2))
        bit = (n // ROWS, -(-k // 4), 32)
        return [
            (groups, Field("high", torch.uint8, (n // ROWS, k // 2, 32))),
            (Field("third", torch.uint8, bit),),
            (Field("fourth", torch.uint8, bit),),
            (Field("low", torch.uint8, (n // ROWS, k, 32)),),
        ]

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        k = align(weight.shape[1], 2)
        weight = weight.float()
        # A column more of the same values does not change a group's range.
        weight = pad(weight.unsqueeze(0), (0, -weight.shape[1] % GROUP), mode="replicate")[0]
        weight = pad(weight, (0, 0, 0, -weight.shape[0] % ROWS))
        grouped = weight.view(len(weight), -1, GROUP)
        lowest, highest = grouped.aminmax(dim=2, keepdim=True)
        # q = 0 is 8.47 steps below zero, q = 255 is 7.47 above. Each is rounded before what depends on it is made.
        zero = (highest * (135.5 / 255) + lowest * (119.5 / 255)).to(torch.bfloat16)
        step = ((highest - zero.float()) / 119.5).maximum((zero.float() - lowest) / 135.5).mul_(16).to(torch.bfloat16)
        codes = (grouped - zero.float()) / (step.float() / 16) + 135.5
        codes = codes.nan_to_num_(128, 128, 128).round_().clamp_(0, 255).to(torch.uint8).view(len(weight), -1)
        groups = torch.cat((step, zero), dim=2).transpose(0, 1).contiguous()
        return {"groups": groups} | _planes(codes[:, :k])

    def decode(self, fields: Fields, n: int, k: int, level: str, dtype: torch.dtype) -> torch.Tensor:
        bits = BITS[level]
        codes = decode_codes(fields, n, k, level).float()
        if bits == 8:
            codes = (codes - 135.5) / 16
        elif bits == 4:
            codes = codes - 8
        elif bits == 3:
            codes = codes * 2 - 7.5
        else:
            codes = codes * 4 - 6 - (codes >= 2).float()
        step, zero = fields["groups"].float().transpose(0, 1).repeat_interleave(GROUP, dim=1)[:n, :k].unbind(2)
        return (zero + step * codes).to(dtype)

    def packed(self, n: int, k: int, level: str, device_type: str) -> tuple[Field, ...] | None:
        if device_type != "cpu" or BITS[level] < 4:
            return None
        (groups, _), *_, (low,) = self.fields(n, k)
        upper = Field("upper", torch.uint8, low.shape)
        return (groups, upper, low) if BITS[level] == 8 else (groups, upper)

    def pack(self, fields: Fields, n: int, k: int, level: str, out: Fields) -> None:
        join(fields["high"], fields["third"], fields["fourth"], out["upper"])
        for name in out.keys() - {"upper"}:
            out[name].copy_(fields[name])

    def linear_each(self, x: torch.Tensor, matrices: Sequence[Fields], n: int, k: int, level: str) -> torch.Tensor:
        if not self.own_rows(n, k, level, x.device.type):
            return super().linear_each(x, matrices, n, k, level)
        y = nested_products(x, [_codes(fields, level) for fields in matrices], MIDDLE[BITS[level]])
        return y if y.shape[1] == n else y[:, :n].contiguous()

    def own_rows(self, n: int, k: int, level: str, device_type: str) -> int:
        return 1 if device_type == "cpu" and is_faster() else 0

    def linear(self, x: torch.Tensor, fields: Fields, n: int, k: int, level: str) -> torch.Tensor:
        if x.device.type == "cuda" and len(x) <= MOST_ROWS_CUDA and _has_triton():
            from offload.formats.gpu import nested as nested_triton

            return nested_triton.linear(x, fields, n, BITS[level])
        if x.device.type != "cpu":
            return torch.mm(x, self.decode(fields, n, k, level, x.dtype).t())
        return multiply(x, *_codes(fields, level), n, MIDDLE[BITS[level]])


def _codes(fields: Fields, level: str) -> Planes:
    """Groups, the upper codes and the lower ones that `level` has, of stored or packed fields on the CPU."""
    if BITS[level] == 2:
        upper = fill(fields["high"])
    elif "upper" in fields:
        upper = fields["upper"]
    else:  # the levels of one matrix lie apart, and are joined for each use
        high = fields["high"]
        upper = high.new_empty(high.shape[0], 2 * high.shape[1], high.shape[2])
        join(high, fields["third"], fields["fourth"] if BITS[level] > 3 else None, upper)
    return fields["groups"], upper, fields["low"] if BITS[level] == 8 else None


def decode_codes(fields: Fields, n: int, k: int, level: str) -> torch.Tensor:
    """The codes [n, k], uint8, of stored fields: the 8-bit ones without the low bits that `level` does not have."""
    bits = BITS[level]
    high = fields["high"]
    if bits == 2:
        codes = torch.cat([high >> 2 & 0x33, high & 0x33], dim=1)
    else:
        third = fields["third"]
        fourth = fields["fourth"] if bits > 3 else torch.zeros_like(third)
        next_ = torch.cat([third & 0xAA | fourth & 0x55, (third & 0x55) << 1 | fourth >> 1 & 0x55], dim=1)
        next_ = next_[:, : high.shape[1]]
        codes = torch.cat([high & 0xCC | next_ & 0x33, (high & 0x33) << 2 | next_ >> 2 & 0x33], dim=1)
    codes = torch.cat([codes & 15, codes >> 4], dim=2)  # [N/64, K, 64]
    if bits == 3:
        codes = codes >> 1
    if bits == 8:
        codes = codes << 4 | torch.cat([fields["low"] & 15, fields["low"] >> 4], dim=2)
    return codes.transpose(1, 2).reshape(-1, codes.shape[1])[:n, :k]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _planes(codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """codes [N, K], uint8, as planes."""
    n, k = codes.shape
    blocks = codes.reshape(n // ROWS, ROWS, k).transpose(1, 2).contiguous()  # [N/64, K, 64]
    halves = blocks >> 4
    halves = halves[..., :32] | halves[..., 32:] << 4
    first, second = halves[:, : k // 2], halves[:, k // 2 :]
    low = blocks & 15
    next_ = first & 0x33 | (second & 0x33) << 2
    next_ = pad(next_, (0, 0, 0, next_.shape[1] % 2))
    left, right = next_.chunk(2, dim=1)
    return {
        "high": first & 0xCC | (second & 0xCC) >> 2,
        "third": left & 0xAA | (right & 0xAA) >> 1,
        "fourth": left & 0x55 | (right & 0x55) << 1,
        "low": low[..., :32] | low[..., 32:] << 4,
    }
