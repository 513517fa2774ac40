"""NF4: 16 levels spaced like a normal distribution (QLoRA, arXiv:2305.14314), in bitsandbytes' own layout."""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch

from offload.formats.base import Field, Fields, Format, GatedRows
from offload.formats.cpu import native
from offload.formats.cpu.features import has_amx
from offload.formats.cpu.nf4 import pack_codes, products, unpack_codes
from offload.formats.cpu.nf4_experts import Nf4Rows
from offload.formats.gate import Gate

BLOCK = 64
TILE = 32
"""Rows of a matrix that kernels take side by side."""
_importing = threading.Lock()


@functools.cache
def bitsandbytes() -> Any:
    """The module `bitsandbytes.functional`, imported without the line it logs about an optional kernel."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with _importing:
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            import bitsandbytes.functional
        finally:
            logger.setLevel(level)
    return bitsandbytes.functional


@functools.cache
def has_packed_kernel() -> bool:
    """Whether our kernel, or else bitsandbytes', runs on this CPU: both take the packed form."""
    return bool(native.level()) or bool(bitsandbytes().has_avx512bf16())


@functools.cache
def code() -> torch.Tensor:
    """The 16 levels, float32, on the CPU."""
    levels: torch.Tensor = bitsandbytes().get_4bit_type("nf4", device="cpu")
    return levels


@functools.cache
def code_int16() -> torch.Tensor:
    """The same in 4096ths."""
    return (code() * 4096).round().to(torch.int16)


@functools.cache
def code_int8() -> torch.Tensor:
    """The same in 127ths."""
    return (code() * 127).round().to(torch.int8)


class NF4(Format):
    """codes uint8 [ceil(n*k/2)] and absmax float32 [ceil(n*k/64)], over the flattened matrix.

    The high nibble of a byte is the even element. Exactly what `quantize_4bit(weight, quant_type="nf4",
    blocksize=64)` returns.

    Packed for a CPU that has a kernel for it (`offload.formats.cpu.native` from AVX2 on, else bitsandbytes'
    for AVX512-BF16), codes are uint8 [n, k/2] in the order that `offload.formats.cpu.nf4` describes. absmax is
    bfloat16, for our kernel [n/32, k/64, 32], as it reads them, and for bitsandbytes' [k/64, n]. x is then rounded to
    bfloat16.

    Unverified: on CUDA bitsandbytes' own dispatch (`gemm_4bit`) computes; it has not run on a GPU here.
    """

    name = "nf4"
    title = "nf4"
    levels = ("nf4",)

    def __init__(self, *, int8_inputs: bool = False) -> None:
        self._int8_inputs = int8_inputs

    def with_int8_inputs(self) -> Format:
        return _with_int8_inputs()

    def integers(self) -> torch.Tensor:
        """The levels as the kernels on the CPU take them."""
        return code_int8() if self._int8_inputs else code_int16()

    @property
    def packing(self) -> str:
        return "tiles" if native.level() else "cpu"

    def fields(self, n: int, k: int) -> list[tuple[Field, ...]]:
        codes = Field("codes", torch.uint8, (-(-n * k // 2),))
        return [(codes, Field("absmax", torch.float32, (-(-n * k // BLOCK),)))]

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, state = bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
        return {"codes": codes.view(-1), "absmax": state.absmax}

    def decode(self, fields: Fields, n: int, k: int, level: str, dtype: torch.dtype) -> torch.Tensor:
        return _decode(fields["codes"], fields["absmax"], n, k, dtype)

    def packed(self, n: int, k: int, level: str, device_type: str) -> tuple[Field, ...] | None:
        if device_type != "cpu" or n % TILE or k % BLOCK or not has_packed_kernel():
            return None
        scales = (n // TILE, k // BLOCK, TILE) if native.level() else (k // BLOCK, n)
        return Field("codes", torch.uint8, (n, k // 2)), Field("absmax", torch.bfloat16, scales)

    def pack(self, fields: Fields, n: int, k: int, level: str, out: Fields) -> None:
        pack_codes(fields["codes"], out["codes"])
        _by_row(out["absmax"]).copy_(fields["absmax"].view(_by_row(out["absmax"]).shape))

    def linear(self, x: torch.Tensor, fields: Fields, n: int, k: int, level: str) -> torch.Tensor:
        codes, absmax = fields["codes"], fields["absmax"]
        if absmax.dtype == torch.bfloat16:
            return self._packed_linear(x, codes, absmax)
        if x.device.type == "cuda":
            bitsandbytes()
            y: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(x, codes.view(-1, 1), (n, k), absmax, BLOCK, "nf4")
            return y
        return torch.mm(x, _decode(codes, absmax, n, k, x.dtype).t())

    def linear_into(self, x: torch.Tensor, fields: Fields, n: int, k: int, level: str, out: torch.Tensor) -> None:
        packed = fields["absmax"].dtype == torch.bfloat16
        if packed and x.dtype == out.dtype == torch.bfloat16 and self._is_ours(x):
            products(x, [fields], n, self.integers(), out)
        else:
            super().linear_into(x, fields, n, k, level, out)

    def _is_ours(self, x: torch.Tensor) -> bool:
        """Whether our kernel multiplies packed matrices with so many rows."""
        return bool(native.level()) and len(x) <= self._most_rows()

    def _most_rows(self) -> int:
        return sys.maxsize if self._int8_inputs else _most_rows()

    def linear_each(self, x: torch.Tensor, matrices: Sequence[Fields], n: int, k: int, level: str) -> torch.Tensor:
        if native.level() and matrices[0]["absmax"].dtype == torch.bfloat16:
            return products(x.to(torch.bfloat16), matrices, n, self.integers()).to(x.dtype)
        return super().linear_each(x, matrices, n, k, level)

    def _packed_linear(self, x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        """x [m, k] with packed codes [n, k/2] and absmax -> [m, n]."""
        n, k = codes.shape[0], x.shape[1]
        inner = x.to(torch.bfloat16)
        if self._is_ours(x):
            y = products(inner, [{"codes": codes, "absmax": absmax}], n, self.integers())
        elif len(x) <= _most_rows():
            y = torch.ops.bitsandbytes.gemv_4bit(inner.contiguous(), codes, (n, k), absmax, code(), BLOCK)
        else:
            scales = _by_row(absmax).float().reshape(-1)
            y = torch.mm(inner, _decode(unpack_codes(codes), scales, n, k, torch.bfloat16).t())
        result: torch.Tensor = y.to(x.dtype)
        return result

    def place(self, fields: Fields) -> tuple[int, ...] | None:
        if not native.level() or fields["absmax"].dtype != torch.bfloat16 or fields["absmax"].device.type != "cpu":
            return None
        return fields["codes"].data_ptr(), fields["absmax"].data_ptr()

    def gated_place(self, up: Fields, down: Fields) -> tuple[int, ...] | None:
        places = [self.place(fields) for fields in (up, down)]
        if None in places:
            return None
        return *(at for each in places if each for at in each), 2 * down["codes"].shape[1]

    def gated_rows(self, x: torch.Tensor, gate: Gate) -> GatedRows | None:
        if x.dtype != torch.bfloat16:
            return None
        return Nf4Rows(x, self.integers(), self._most_rows(), gate)

    def own_rows(self, n: int, k: int, level: str, device_type: str) -> int:
        return self._most_rows() if native.level() and self.packed(n, k, level, device_type) is not None else 0


@functools.cache
def _with_int8_inputs() -> NF4:
    """One for all matrices: experts of one form are computed together."""
    return NF4(int8_inputs=True)


def _by_row(absmax: torch.Tensor) -> torch.Tensor:
    """Packed scales, row by row of the matrix: [n/32, 32, k/64] or [n, k/64], over the same memory."""
    return absmax.transpose(-2, -1)


def _decode(codes: torch.Tensor, absmax: torch.Tensor, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    bitsandbytes()
    # bitsandbytes 0.50.2 takes the wrong absmax on CPUs with AVX512 where a row ends within a block: there is one row.
    shape = (n, k) if k % BLOCK == 0 else (1, n * k)
    weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes.view(-1, 1), absmax, BLOCK, "nf4", shape, dtype)
    return weight.view(n, k)


def _most_rows() -> int:
    """Up to how many rows of x the packed kernel is the faster way.

    Measured on Qwen3-30B-A3B's shapes. Without AMX no product of dequantised weights is as fast as our kernel.
    """
    if not native.level():
        return 40 if has_amx() else 64
    return 96 if has_amx() else sys.maxsize
