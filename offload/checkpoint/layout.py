"""What one expert is made of on disk, and how it lies in a slot of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from cache.types import ExpertKey
from offload.checkpoint.dequantize import PackedTensor
from offload.checkpoint.parameter import ExpertParameter, Piece, align
from offload.checkpoint.recipes import Recipe
from offload.checkpoint.shards import TensorInfo
from offload.system.seen import SeenFile


@dataclass
class ExpertLayer:
    """One MoE layer: where its experts lie on disk and how one of them is laid out in a slot of memory.

    A slot is `slot_bytes` bytes; parameter p of the expert starts at `p.slot_offset`, aligned to 64 bytes.
    """

    index: int
    path: str
    num_experts: int
    parameters: tuple[ExpertParameter, ...]
    model: Any = field(repr=False)

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes one expert takes in memory, alignment included."""
        last = self.parameters[-1]
        return align(last.slot_offset + last.nbytes)

    @cached_property
    def is_transposed(self) -> bool:
        """Whether the model keeps an expert's matrices as [k, n], inputs first."""
        return bool(getattr(self.model.get_submodule(self.path), "is_transposed", False))

    @cached_property
    def scratch_bytes(self) -> int:
        """Bytes a reader needs for what must be converted before it is an expert; 0 for most checkpoints."""
        return sum(parameter.scratch_bytes for parameter in self.converted)

    @cached_property
    def work_bytes(self) -> int:
        """Bytes that `finish` takes besides scratch and slot."""
        plain = sum(parameter.work_bytes for parameter in self.converted if not parameter.is_quantized)
        return max([plain, *(parameter.work_bytes for parameter in self.converted if parameter.is_quantized)])

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one expert on disk."""
        return sum(parameter.source_bytes for parameter in self.parameters)

    @cached_property
    def layout(self) -> tuple[tuple[object, ...], ...]:
        """What a slot of this layer looks like; layers with equal layouts can share views of a slot."""
        return tuple((p.name, p.slot_offset, p.shape, p.dtype) for p in self.parameters)

    @cached_property
    def converted(self) -> tuple[ExpertParameter, ...]:
        """The parameters whose bytes on disk are not their bytes in memory."""
        return tuple(parameter for parameter in self.parameters if not parameter.is_direct)

    def slot_pieces(self, expert: int) -> list[Piece]:
        """What to read straight into the slot."""
        return _pieces([p for p in self.parameters if p.is_direct], expert, "slot_offset")

    def scratch_pieces(self, expert: int) -> list[Piece]:
        """What to read into scratch memory for `finish`."""
        return _pieces(self.converted, expert, "scratch_offset")

    def finish(self, scratch: torch.Tensor, slot: torch.Tensor) -> None:
        """Convert what was read into `scratch` (uint8) and write it to `slot` (uint8)."""
        views = self.views(slot)
        for parameter in self.converted:
            views[parameter.name].copy_(parameter.convert(scratch, self.model))

    def views(self, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """The expert's parameters as tensors over `slot` (uint8): name -> [...], no copy."""
        return {
            p.name: slot[p.slot_offset : p.slot_offset + p.nbytes].view(p.dtype).view(p.shape) for p in self.parameters
        }


@dataclass(frozen=True)
class ExpertMap:
    """All MoE layers of a checkpoint, the tensors that belong to no expert, and those of them that must be unpacked.

    `dense_names`: by the model's name of a parameter, the tensor of `dense` that is it, under whatever name, unchanged.
    `recipes` make the other parameters of `dense`. `notes` say what was taken otherwise than it stands there, or not
    at all.
    `files`: what was seen of the files that all of them are in.
    """

    layers: tuple[ExpertLayer, ...]
    dense: dict[str, TensorInfo]
    packed: dict[str, PackedTensor] = field(default_factory=dict)
    dense_names: dict[str, str] = field(default_factory=dict)
    recipes: tuple[Recipe, ...] = ()
    notes: tuple[str, ...] = ()
    files: Mapping[str, SeenFile] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """The most experts any layer has."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def total_experts(self) -> int:
        """Experts of all layers together."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of memory that any expert fits in."""
        return max(layer.slot_bytes for layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts on disk."""
        return sum(layer.num_experts * layer.record_bytes for layer in self.layers)

    def all_keys(self) -> Iterator[ExpertKey]:
        """Every expert, layer after layer."""
        for layer in self.layers:
            for expert in range(layer.num_experts):
                yield ExpertKey(layer.index, expert)

    def layer_of(self, key: ExpertKey) -> ExpertLayer:
        """The layer an expert belongs to."""
        return self.layers[key.layer]


def _pieces(parameters: Sequence[ExpertParameter], expert: int, offset: str) -> list[Piece]:
    pieces = []
    for parameter in parameters:
        at = getattr(parameter, offset)
        for source in parameter.sources:
            piece = source.piece(expert, at)
            pieces.append(piece)
            at += piece.nbytes if offset == "slot_offset" else align(piece.nbytes)
    return pieces
