"""Compile every Triton kernel to machine code of a GPU; none is needed for that. Fails where one does not compile."""

from __future__ import annotations

from typing import Any

import torch
import triton
from expert_slots import CLAMPED, KINDS, SILU, place
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from offload.engine.fused import kernels as grouped_triton
from offload.formats.gpu import nested as nested_triton

AMPERE = GPUTarget("cuda", 80, 32)
POINTERS = {
    **dict.fromkeys(("x", "inner", "out", "y", "groups"), "*bf16"),
    **dict.fromkeys(("block", "high", "third_bits", "fourth_bits", "low"), "*u8"),
    **dict.fromkeys(("weights", "partial", "levels"), "*fp32"),
    **{"slots": "*i32", "alpha": "fp32", "limit": "fp32", "slot_bytes": "i64"},
}


def compile_kernel(kernel: Any, constants: dict[str, Any]) -> None:
    """`kernel`, every number and address of which is a multiple of 16, as most are."""
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names}
    plain = (*constants, "alpha", "limit", "top_k", "complete")
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in plain}
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=AMPERE)
    assert compiled.asm["cubin"]


for kind in KINDS:
    matrix, _ = place(kind, 128, 64, torch.bfloat16, 0, bias=kind != "nf4")
    constants, _ = grouped_triton.constants_of(matrix)
    activation = SILU if kind == "nf4" else CLAMPED
    gates = {"INTERLEAVED": activation.interleaved, "CLAMPED": activation.limit is not None}
    compile_kernel(grouped_triton._gate_up, {**constants, **gates})
    compile_kernel(grouped_triton._down, constants)
for bits in (8, 4, 3, 2):
    for tokens in (1, 16):
        tiles = {"ROWS": nested_triton.ROWS, "ENTRIES": nested_triton.ENTRIES}
        compile_kernel(nested_triton._linear, {"BITS": bits, "TOKENS": tokens, **tiles})
