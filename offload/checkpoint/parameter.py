"""One parameter of a layer's experts: the tensors on disk that it is made of, and how one expert's share is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist

from offload.checkpoint.dequantize import (
    dequantize,
    is_dequantization,
    is_scale,
    numbers_per_byte,
    scale_of,
    work_bytes,
)
from offload.checkpoint.shards import TensorInfo

ALIGNMENT = 64  # bytes; CPU kernels give other last bits on less aligned weights

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to a multiple of `to`."""
    return -(-nbytes // to) * to


@dataclass(frozen=True, slots=True)
class Piece:
    """`nbytes` of `file` from byte `offset`, and the byte of the destination where they belong."""

    file: str
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Source:
    """The tensors on disk that one pattern of a conversion matched: one for each expert, or one for all of them."""

    pattern: str
    tensors: tuple[TensorInfo, ...]
    fused: bool

    @property
    def dtype(self) -> torch.dtype:
        """Type on disk."""
        return TORCH_DTYPES[self.tensors[0].dtype]

    def shape(self) -> tuple[int, ...]:
        """Shape of one expert's share, with a leading 1 if the tensor on disk holds all experts."""
        shape = self.tensors[0].shape
        return (1, *shape[1:]) if self.fused else shape

    def piece(self, expert: int, at: int) -> Piece:
        """Where `expert`'s share lies."""
        if not self.fused:
            tensor = self.tensors[expert]
            return Piece(tensor.file, tensor.offset, tensor.nbytes, at)
        tensor = self.tensors[0]
        nbytes = tensor.nbytes // tensor.shape[0]
        return Piece(tensor.file, tensor.offset + expert * nbytes, nbytes, at)


@dataclass(frozen=True, slots=True)
class ExpertParameter:
    """One parameter of one layer's experts: what it is in memory, and what it is made of on disk."""

    name: str
    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    slot_offset: int
    scratch_offset: int
    sources: tuple[Source, ...]
    converter: Any

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's share in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def source_bytes(self) -> int:
        """Bytes of one expert's share on disk."""
        return sum(source.piece(0, 0).nbytes for source in self.sources)

    @property
    def source_elements(self) -> int:
        """Numbers in one expert's share on disk."""
        return sum(torch.Size(source.shape()).numel() for source in self.sources)

    @property
    def is_quantized(self) -> bool:
        """Whether its numbers on disk need scales to be what they are in memory."""
        return any(is_scale(source.pattern) for source in self.sources)

    @property
    def work_bytes(self) -> int:
        """Bytes that `convert` takes besides `scratch`."""
        if not self.is_quantized:
            # Each of at most two steps makes a copy of what it turns.
            return 2 * self.scratch_bytes
        sources = {source.pattern: source for source in self.sources}
        bands = (
            work_bytes(self.converter.operations[0], source.shape(), scale.shape(), numbers_per_byte(source.dtype))
            for pattern, source in sources.items()
            if (scale := sources.get(scale_of(pattern))) is not None
        )
        # Numbers in the model's type, and a copy when matrices are put together.
        return 2 * self.nbytes + max(bands)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of `scratch` that its sources take."""
        return sum(align(source.piece(0, 0).nbytes) for source in self.sources)

    @property
    def is_direct(self) -> bool:
        """Whether one expert's bytes on disk, source after source, are its bytes in memory."""
        if any(TORCH_DTYPES.get(t.dtype) != self.dtype for source in self.sources for t in source.tensors[:1]):
            return False
        operations = [] if self.converter is None else list(self.converter.operations)
        if operations and is_dequantization(operations[0]) and not self.is_quantized:
            operations.pop(0)
        if operations and isinstance(operations[0], MergeModulelist):
            operations.pop(0)
        # Rows stacked below rows: for one expert, one tensor's bytes after the other's.
        if operations and isinstance(operations[0], Concatenate) and operations[0].dim == 1:
            operations.pop(0)
        return not operations

    def convert(self, scratch: torch.Tensor, model: Any) -> torch.Tensor:
        """One expert's parameter from its sources' bytes, laid one after the other (aligned) in `scratch`, uint8."""
        return self.made(scratch, model).reshape(self.shape).to(self.dtype)

    @torch.no_grad()
    def made(self, scratch: torch.Tensor, model: Any) -> torch.Tensor:
        """The same, as transformers' steps leave it: of an experts parameter with one expert, where all fits."""
        collected: dict[str, list[torch.Tensor]] = {}
        at = self.scratch_offset
        for source in self.sources:
            nbytes = source.piece(0, 0).nbytes
            collected[source.pattern] = [scratch[at : at + nbytes].view(source.dtype).view(source.shape())]
            at += align(nbytes)
        if self.converter is None:
            (tensors,) = collected.values()
            return tensors[0]
        value: Any = collected
        for operation in self.converter.operations:
            if is_dequantization(operation):
                value = dequantize(operation, value, self.dtype)
                continue
            value = operation.convert(
                value,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.target,
                model=_OneExpertModel(model),
                config=model.config,
                missing_keys=None,
            )
        (made,) = value.values()
        tensor: torch.Tensor = made[0] if isinstance(made, list) else made
        return tensor


class _OneExpertModel:
    """The model as conversion steps see it, with one expert: some look at the target's shape to decide."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def get_parameter(self, name: str) -> torch.Tensor:
        shape = self._model.get_parameter(name).shape
        return torch.empty((1, *shape[1:]), device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
