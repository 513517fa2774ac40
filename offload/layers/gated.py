"""Experts of the common designs, gate and up with an activation, computed whole by a kernel of their format.

Their gate is known by its code.
"""

from __future__ import annotations

import ast
import functools
import struct
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from offload.formats import Gate, GatedRows
from offload.formats.cpu import native, plain_experts
from offload.formats.cpu.plain import most_rows_of_experts
from offload.formats.cpu.plain_experts import PlainRows
from offload.layers.products import PlainMatrix
from offload.layers.source import function_code
from offload.store.base import Matrix, Weights
from offload.store.record import StoredMatrix

_SILU = (nn.SiLU, SiLUActivation)


class _Known(NamedTuple):
    """A gate whose numbers have names in the experts module, none: it has not."""

    limit: str | None = None
    alpha: str | None = None
    plus: float = 0.0
    interleaved: bool = False
    named: bool = True
    """Its activation is the module's `act_fn`."""


_LIMITED = """
def _apply_gate(self, gate_up):
    gate, up = {parts}
    gate = gate.clamp(max=self.{limit})
    up = up.clamp(min=-self.{limit}, max=self.{limit})
"""
_HALVES, _IN_TURN = "gate_up.chunk(2, dim=-1)", "(gate_up[..., ::2], gate_up[..., 1::2])"
_GLU = "    glu = gate * torch.sigmoid(gate * self.{alpha})\n"
_STEPS = _GLU + "    gated_output = (up + 1) * glu\n    return gated_output"
_KNOWN = {
    ast.unparse(ast.parse(_LIMITED.format(parts=parts, limit=known.limit) + rest.format(alpha=known.alpha))): known
    for known, parts, rest in (
        (_Known("limit", "alpha", 1.0, interleaved=True, named=False), _IN_TURN, _STEPS),
        (_Known("limit", "alpha", 1.0, named=False), _HALVES, _STEPS),
        (_Known("swiglu_limit", "swiglu_alpha", 1.0, named=False), _HALVES, _GLU + "    return (up + 1.0) * glu"),
        (_Known("limit"), _HALVES, "    return self.act_fn(gate) * up"),
        (_Known("swiglu_limit", named=False), _HALVES, "    return F.silu(gate) * up"),
    )
}
"""What gates of experts do, by their code; the commonest is transformers' own function."""


class Kernel(Protocol):
    """Whose kernel computes experts whole."""

    def gated_rows(self, x: torch.Tensor, gate: Gate) -> GatedRows | None:
        """x [T, H] for experts that have a place; None for a dtype that the kernel does not take."""


class _Plain:
    """That of plain matrices."""

    def gated_rows(self, x: torch.Tensor, gate: Gate) -> GatedRows | None:
        return PlainRows(x, most_rows_of_experts(), gate) if x.dtype is torch.bfloat16 else None


PLAIN = _Plain()


class GatedExpert(dict[str, "torch.Tensor | Matrix"]):
    """An expert's parameters in host memory. A kernel of `form` computes it whole, and finds it by its `place`."""

    def __init__(self, weights: Weights, form: Kernel, place: tuple[int, ...]) -> None:
        super().__init__(weights)
        self.form = form
        self.place = place
        self.packed = struct.pack(f"{len(place) - 1}q", *place[:-1])
        """All of that but the last number, as 64-bit numbers."""


def placed(weights: Weights) -> Weights:
    """The same parameters, as a `GatedExpert` where a kernel computes such experts whole."""
    if isinstance(weights, GatedExpert):
        return weights
    found = _matrices(weights.get("gate_up_proj"), weights.get("down_proj"))
    biases = _biases(weights)
    return weights if found is None or biases is None else GatedExpert(weights, found[0], (*biases, *found[1]))


def gated_rows(module: Any, x: torch.Tensor, weights: Weights) -> GatedRows | None:
    """x [T, H] for experts of `module` (an experts module) that are stored as `weights` are.

    None where the module computes otherwise, or no kernel computes such experts whole.
    """
    gate = gate_of(module) if isinstance(weights, GatedExpert) else None
    return weights.form.gated_rows(x, gate) if isinstance(weights, GatedExpert) and gate is not None else None


def gate_of(module: Any) -> Gate | None:
    """What experts of a module do between their products; None for what no kernel of ours does."""
    cls: Any = type(module)
    known = _known(cls) if module.has_gate else None
    if known is None or (known.named and type(module.act_fn) not in _SILU):
        return None
    limit = None if known.limit is None else getattr(module, known.limit)
    alpha = 1.0 if known.alpha is None else getattr(module, known.alpha)
    return Gate() if limit is None else Gate(limit, alpha, known.plus, known.interleaved)


@functools.cache
def _known(cls: Any) -> _Known | None:
    apply_gate = getattr(cls, "_apply_gate", None)
    return (
        _Known()
        if apply_gate is _default_apply_gate
        else _KNOWN.get(function_code(apply_gate).replace("min=None, ", ""))
    )


def _matrices(up: Any, down: Any) -> tuple[Kernel, tuple[int, ...]] | None:
    """Whose kernel finds two matrices, and by what."""
    if isinstance(up, PlainMatrix) and isinstance(down, PlainMatrix):
        if up.transposed or down.transposed or not native.level() or not plain_experts.serves(up.weight, down.weight):
            return None
        return PLAIN, plain_experts.place(up.weight, down.weight)
    if isinstance(up, StoredMatrix) and isinstance(down, StoredMatrix):
        place = up.form.gated_place(up.fields, down.fields)
        return None if place is None else (up.form, place)
    return None


def _biases(weights: Weights) -> tuple[int, int] | None:
    """The addresses of both biases, 0 for none; None where they are not what kernels take."""
    found = []
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        bias = weights.get(name)
        if bias is None:
            found.append(0)
        elif isinstance(bias, torch.Tensor) and bias.dtype is torch.bfloat16 and bias.is_contiguous() and bias.is_cpu:
            found.append(bias.data_ptr())
        else:
            return None
    return found[0], found[1]
