"""Where an expert's matrices lie in a slot, and what is done between them, for kernels that find experts by slot.

It is taken from what the store and the model's own experts module show: families and formats are not listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from offload.formats import Field, find_format
from offload.store.base import Weights
from offload.store.record import StoredMatrix

FIELDS = {
    "int8": ("codes", "scales"),
    "nf4": ("codes", "absmax"),
    "nested8": ("high", "groups", "third", "fourth", "low"),
    "nested4": ("high", "groups", "third", "fourth"),
    "nested3": ("high", "groups", "third"),
    "nested2": ("high", "groups"),
}
"""Of each format's level, in the order of `MatrixPlace.fields`."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Activation:
    """What turns gate and up [M, I] into one [M, I].

    silu(gate) * up; if `limit` is given, (up + 1) * gate * sigmoid(alpha * gate), where gate is at most the limit and
    up at most so far from 0. `interleaved`: gate and up take turns in the product's columns, else one is behind the
    other.
    """

    interleaved: bool
    alpha: float = 1.0
    limit: float | None = None

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [..., 2I] -> [..., I]."""
        gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if self.interleaved else gate_up.chunk(2, dim=-1)
        if self.limit is None:
            return torch.nn.functional.silu(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


@dataclass(frozen=True)
class MatrixPlace:
    """A matrix [n, k] (n outputs, k inputs) in a slot.

    `kind` is "plain", "transposed" (plain, stored as [k, n]), or a format's level. `fields` are the bytes of the slot
    at which the weights begin, or the fields of the format: int8 has codes and scales, nf4 codes and absmax, nested
    the planes and groups high, groups, third, fourth, low. `bias` [n], of type `dtype` like plain weights, begins at
    that byte.
    """

    kind: str
    n: int
    k: int
    dtype: torch.dtype
    fields: tuple[int, ...]
    bias: int | None

    @classmethod
    def of(cls, weights: Weights, name: str, transposed: bool) -> MatrixPlace | None:
        """The matrix `name` of an expert whose views start at the slot's first byte; None where no kernel reads it."""
        weight, bias = weights[name], weights.get(f"{name}_bias")
        if bias is not None and not isinstance(bias, torch.Tensor):
            return None
        at = None if bias is None else _offset(bias)
        if isinstance(weight, torch.Tensor):
            if weight.dtype not in _FLOATS or weight.dim() != 2 or (bias is not None and bias.dtype != weight.dtype):
                return None
            n, k = weight.shape[::-1] if transposed else weight.shape
            kind = "transposed" if transposed else "plain"
            return cls(kind, n, k, weight.dtype, (_offset(weight),), at)
        if not isinstance(weight, StoredMatrix) or (bias is not None and bias.dtype not in _FLOATS):
            return None
        shape, names = weight.shape, FIELDS.get(weight.level, ())
        stored = {field.name: field for field in weight.form.stored(shape.n, shape.k, weight.level)}
        if not names or weight.fields.keys() != stored.keys():  # packed for another processor
            return None
        if any(weight.fields[field].dtype != stored[field].dtype for field in names):
            return None
        if weight.level == "nf4" and shape.k % 2:  # a row would begin within a byte
            return None
        dtype = torch.bfloat16 if bias is None else bias.dtype
        return cls(weight.level, shape.n, shape.k, dtype, tuple(_offset(weight.fields[f]) for f in names), at)

    def views(self, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """The format's fields over `slot` (uint8), or "weight" as it is stored, and "bias" if there is one; no copy."""
        if self.kind in ("plain", "transposed"):
            shape = (self.k, self.n) if self.kind == "transposed" else (self.n, self.k)
            fields = [Field("weight", self.dtype, shape)]
        else:
            form, level = find_format(self.kind)
            stored = {field.name: field for field in form.stored(self.n, self.k, level)}
            fields = [stored[name] for name in FIELDS[level]]
        places = list(zip(fields, self.fields, strict=True))
        if self.bias is not None:
            places.append((Field("bias", self.dtype, (self.n,)), self.bias))
        return {f.name: slot[at : at + f.nbytes].view(f.dtype).view(f.shape) for f, at in places}


@dataclass(frozen=True)
class ExpertPlaces:
    """An expert [H] -> [H] in a slot of `slot_bytes`: gate_up [2I, H], the activation, down [H, I]."""

    slot_bytes: int
    gate_up: MatrixPlace
    down: MatrixPlace
    activation: Activation

    @classmethod
    def of(cls, module: Any, slot_bytes: int, weights: Callable[[torch.Tensor], Weights]) -> ExpertPlaces | None:
        """The experts of `module` (an experts module), of whom `weights` makes the parameters over a slot (uint8).

        None where they are something else than that, or in a form that no kernel reads.
        """
        if not module.has_gate or module.has_post_expert_norm:
            return None
        activation = find_activation(module)
        views = weights(torch.empty(slot_bytes, dtype=torch.uint8, device="meta"))
        if activation is None:
            return None
        gate_up, down = (MatrixPlace.of(views, f"{name}_proj", module.is_transposed) for name in ("gate_up", "down"))
        if gate_up is None or down is None or gate_up.n != 2 * down.k or gate_up.k != down.n:
            return None
        return cls(slot_bytes, gate_up, down, activation)


def find_activation(module: Any) -> Activation | None:
    """What `module._apply_gate` computes, found by trying it; None for anything that `Activation` is not."""
    known = [Activation(interleaved) for interleaved in (False, True)]
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if isinstance(alpha, (int, float)) and isinstance(limit, (int, float)):
        known += [Activation(interleaved, float(alpha), float(limit)) for interleaved in (False, True)]
    largest = 3 * max(known[-1].limit or 0.0, 3.0)
    shuffled = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    probe = torch.linspace(-largest, largest, 256)[shuffled].view(8, 32)
    try:
        given = module._apply_gate(probe.clone())
    except RuntimeError:  # it wants something of its own, on its own device
        return None
    for activation in known:
        wanted = activation(probe)
        if given.shape == wanted.shape and torch.allclose(given, wanted, rtol=1e-5, atol=1e-6):
            return activation
    return None


def _offset(view: torch.Tensor) -> int:
    return int(view.storage_offset()) * view.dtype.itemsize
