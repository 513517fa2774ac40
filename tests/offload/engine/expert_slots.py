"""Experts of any format in slots in a row, for the tests of kernels that find them by slot."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from offload.checkpoint.parameter import align
from offload.engine.fused.places import FIELDS, Activation, ExpertPlaces, MatrixPlace
from offload.formats import find_format
from offload.formats.base import Format

KINDS = ("plain", "transposed", "int8", "nf4", "nested8", "nested4", "nested3", "nested2")
SILU = Activation(interleaved=False)
CLAMPED = Activation(interleaved=True, alpha=1.702, limit=0.6)


def place(kind: str, n: int, k: int, dtype: torch.dtype, at: int, *, bias: bool) -> tuple[MatrixPlace, int]:
    """A matrix at byte `at` of a slot, and where the next one may begin."""
    if kind in ("plain", "transposed"):
        sizes = [n * k * dtype.itemsize]
    else:
        form, level = find_format(kind)
        stored = {field.name: field.nbytes for field in form.stored(n, k, level)}
        sizes = [stored[name] for name in FIELDS[kind]]
    fields = []
    for nbytes in sizes:
        fields.append(at)
        at = align(at + nbytes)
    matrix = MatrixPlace(kind, n, k, dtype, tuple(fields), at if bias else None)
    return matrix, align(at + n * dtype.itemsize) if bias else at


@dataclass(frozen=True)
class Experts:
    """`block` (uint8) holds expert e in slot `slots[e]`."""

    places: ExpertPlaces
    block: torch.Tensor
    slots: list[int]

    @classmethod
    def random(
        cls,
        kind: str,
        hidden: int,
        inner: int,
        count: int,
        dtype: torch.dtype,
        activation: Activation,
        *,
        bias: bool,
        seed: int = 0,
    ) -> Experts:
        """So many experts, each in the slot of its number."""
        gate_up, at = place(kind, 2 * inner, hidden, dtype, 0, bias=bias)
        down, at = place(kind, hidden, inner, dtype, at, bias=bias)
        places = ExpertPlaces(at, gate_up, down, activation)
        block = torch.zeros(count * at, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(seed)
        for slot in block.view(count, at):
            for matrix in (gate_up, down):
                views = matrix.views(slot)
                weight = torch.randn(matrix.n, matrix.k, generator=generator) / matrix.k**0.5
                if matrix.bias is not None:
                    views["bias"].copy_(torch.randn(matrix.n, generator=generator) / 2)
                if "weight" in views:
                    views["weight"].copy_(weight.t() if kind == "transposed" else weight)
                    continue
                form: Format = find_format(kind)[0]
                for name, field in form.encode(weight).items():
                    if name in views:
                        views[name].copy_(field)
        return cls(places, block, list(range(count)))

    def moved(self, seed: int = 1) -> Experts:
        """The same experts in other slots of a larger block, whose other bytes are 0xFF."""
        count, nbytes = len(self.slots), self.places.slot_bytes
        block = torch.full((2 * count * nbytes,), 0xFF, dtype=torch.uint8)
        slots = torch.randperm(2 * count, generator=torch.Generator().manual_seed(seed))[:count].tolist()
        for old, new in zip(self.slots, slots, strict=True):
            block.view(-1, nbytes)[new] = self.block.view(-1, nbytes)[old]
        return replace(self, block=block, slots=slots)

    def of(self, experts: torch.Tensor) -> torch.Tensor:
        """The slots, int32, of experts [T, K]; -1 stays."""
        return torch.tensor([*self.slots, -1], dtype=torch.int32)[experts]


def routing(tokens: int, top_k: int, experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts [T, K] for every token, and weights [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    return chosen, torch.rand(tokens, top_k, generator=generator)
