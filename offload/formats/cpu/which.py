"""Whose kernels multiply on this CPU, for whoever wants to know."""

from __future__ import annotations

from typing import Any

from offload.formats.cpu import features, native
from offload.formats.cpu.plain import is_faster
from offload.formats.nf4 import has_packed_kernel


def cpu(*, exact: bool) -> dict[str, Any]:
    """Of this machine, within OFFLOAD_CPU: `instructions`, the level in use, and `kernels`, by the form of a matrix
    those of a product with one token: "offload", "torch" or "bitsandbytes". `exact`: plain products have torch's bits.
    """
    ours = "offload" if is_faster() else "torch"
    nf4 = "offload" if native.level() else "bitsandbytes" if has_packed_kernel() else "torch"
    kernels = {"plain": "torch" if exact else ours, "int8": ours, "nf4": nf4, "nested": ours}
    return {"instructions": features.level(), "kernels": kernels}
