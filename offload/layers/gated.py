"""Experts of the commonest design, gate and up with SiLU between them, computed whole by a kernel of their format."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from offload.formats import GatedRows
from offload.formats.cpu import native, plain_experts
from offload.formats.cpu.plain import most_rows_of_experts
from offload.formats.cpu.plain_experts import PlainRows
from offload.layers.products import PlainMatrix
from offload.store.base import Matrix, Weights
from offload.store.record import StoredMatrix

_SILU = (nn.SiLU, SiLUActivation)


class Kernel(Protocol):
    """Whose kernel computes experts whole."""

    def gated_rows(self, x: torch.Tensor) -> GatedRows | None:
        """x [T, H] for experts that have a place; None for a dtype that the kernel does not take."""


class _Plain:
    """That of plain matrices."""

    def gated_rows(self, x: torch.Tensor) -> GatedRows | None:
        return PlainRows(x, most_rows_of_experts()) if x.dtype is torch.bfloat16 else None


PLAIN = _Plain()


class GatedExpert(dict[str, "torch.Tensor | Matrix"]):
    """An expert's parameters in host memory. A kernel of `form` computes it whole, and finds it by its `place`."""

    def __init__(self, weights: Weights, form: Kernel, place: tuple[int, ...]) -> None:
        super().__init__(weights)
        self.form = form
        self.place = place


def placed(weights: Weights) -> Weights:
    """The same parameters, as a `GatedExpert` where a kernel computes such experts whole."""
    if isinstance(weights, GatedExpert):
        return weights
    up, down = weights.get("gate_up_proj"), weights.get("down_proj")
    if isinstance(up, PlainMatrix) and isinstance(down, PlainMatrix):
        if not (up.transposed or down.transposed) and native.level() and plain_experts.serves(up.weight, down.weight):
            return GatedExpert(weights, PLAIN, plain_experts.place(up.weight, down.weight))
        return weights
    if isinstance(up, StoredMatrix) and isinstance(down, StoredMatrix):
        place = up.form.gated_place(up.fields, down.fields)
        if place is not None:
            return GatedExpert(weights, up.form, place)
    return weights


def gated_rows(module: Any, x: torch.Tensor, weights: Weights) -> GatedRows | None:
    """x [T, H] for experts of `module` (an experts module) that are stored as `weights` are.

    None where the module computes otherwise, or no kernel computes such experts whole.
    """
    if not isinstance(weights, GatedExpert) or not _is_plain(module):
        return None
    return weights.form.gated_rows(x)


def _is_plain(module: Any) -> bool:
    """Whether experts are down(silu(gate) * up), the gate above up in one matrix, without biases."""
    return (
        module.has_gate
        and not module.has_bias
        and getattr(type(module), "_apply_gate", None) is _default_apply_gate
        and type(module.act_fn) in _SILU
    )
