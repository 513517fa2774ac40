"""What this CPU can do that decides which kernel is the fastest."""

from __future__ import annotations

import functools

import torch

from offload.system.instructions import LEVELS, asked

_NEEDS = {
    "avx2": "avx2",
    "avx512": "avx512_f",
    "avx512-bf16": "avx512_bf16",
    "amx": "amx_tile",
    "neon": "neon",
    "neon-dotprod": "dot",
    "neon-bf16": "bf16",
}
"""What torch calls that which a level has and the level before has not."""


@functools.cache
def level() -> str:
    """The best of `LEVELS` that this processor has and OFFLOAD_CPU allows. Raises DeviceError for one that is none."""
    has = torch.cpu.get_capabilities()
    lacking = (i for i, level in enumerate(LEVELS) if level in _NEEDS and not has.get(_NEEDS[level], False))
    best = next(lacking, len(LEVELS)) - 1
    return LEVELS[min(best, LEVELS.index(asked() or LEVELS[-1]))]


def has_amx() -> bool:
    """Whether it multiplies tiles of bfloat16: large products are then so fast that dequantising pays early."""
    return level() == "amx"


@functools.cache
def has_int4_kernel() -> bool:
    """Whether torch's 4-bit kernel takes codes laid out as the nested format's: that depends on the CPU's vectors."""
    codes = torch.arange(64 * 64, dtype=torch.int32).view(64, 64) * 7 % 16
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (AttributeError, RuntimeError):  # a build of torch without it
        return False
    ours = codes.t().to(torch.uint8)
    return torch.equal(theirs.view(64, 32), ours[:, :32] | ours[:, 32:] << 4)
