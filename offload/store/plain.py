"""Experts as the checkpoint has them, read from its shards: nothing is converted beforehand and no bit is lost."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.parameter import align
from offload.store.base import ExpertSlice, ExpertStore, Precision, SliceReader, Weights
from offload.store.files import BLOCK, BOUNCE_BYTES, PART_BYTES, FileReader, cut

_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"
}  # fmt: skip


def own_precision(experts: ExpertMap) -> str:
    """The name of the precision that experts have in the model: that of its dtype."""
    return precision_of(experts.layers[0].parameters[0].dtype)


def precision_of(dtype: torch.dtype) -> str:
    """What a plain dtype is called as a precision."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


class CheckpointStore(ExpertStore):
    """The experts at the model's own precision, which is one slice."""

    def __init__(self, experts: ExpertMap, direct: bool = True) -> None:
        self._experts = experts
        self.slices = [CheckpointSlice(experts, direct)]
        self.precisions = [Precision(self.slices[0].name, (0,))]

    def layout(self, layer: int) -> Hashable:
        """Names, places and types of the parameters."""
        return self._experts.layers[layer].layout

    def weights(self, layer: int, precision: int, slots: Sequence[torch.Tensor]) -> Weights:
        """The parameters, over the one slot."""
        return self._experts.layers[layer].views(slots[0])


class CheckpointSlice(ExpertSlice):
    """Whole experts, read from the shards."""

    def __init__(self, experts: ExpertMap, direct: bool = True) -> None:
        self.name = own_precision(experts)
        self._experts = experts
        self._direct = direct

    @property
    def slot_bytes(self) -> int:
        """Bytes of memory that any expert fits in."""
        return self._experts.slot_bytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts on disk."""
        return self._experts.expert_bytes

    @property
    def reader_bytes(self) -> int:
        """A bounce buffer, and what conversions take."""
        return bounce_bytes(self._experts) + conversion_bytes(self._experts)

    @property
    def copies_out(self) -> bool:
        """Out of a bounce buffer. Where it is converted, too, one thread does all of an expert."""
        return copies_out(self._experts)

    def open(self) -> CheckpointReader:
        """A reader for one thread."""
        return CheckpointReader(self._experts, self._direct)

    def record_bytes(self, key: ExpertKey) -> int:
        """What the expert takes on disk."""
        return self._experts.layer_of(key).record_bytes

    def parts(self, key: ExpertKey, readers: int) -> int:
        """One where conversion needs all of it in one reader's scratch memory, or where parts would be small."""
        layer = self._experts.layer_of(key)
        return 1 if layer.converted else max(1, min(readers, layer.record_bytes // PART_BYTES))


class CheckpointReader(SliceReader):
    """Reads an expert's tensors into their places; what needs conversion by way of scratch memory."""

    def __init__(self, experts: ExpertMap, direct: bool) -> None:
        self._experts = experts
        self._files = FileReader(direct, bounce_bytes(experts), experts.files)
        scratch = max(layer.scratch_bytes for layer in experts.layers)
        self._scratch = torch.empty(scratch, dtype=torch.uint8)

    def read(self, key: ExpertKey, slot: torch.Tensor, part: int = 0, parts: int = 1) -> int:
        """Fill `slot` with the expert's exact bytes."""
        layer = self._experts.layer_of(key)
        total = self._files.read(cut(layer.slot_pieces(key.expert), parts)[part], slot.numpy())
        if layer.converted:
            total += self._files.read(layer.scratch_pieces(key.expert), self._scratch.numpy())
            layer.finish(self._scratch, slot)
        return total

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def conversion_bytes(experts: ExpertMap) -> int:
    """What a reader needs for the conversion of an expert."""
    return max(layer.scratch_bytes + layer.work_bytes for layer in experts.layers)


def copies_out(experts: ExpertMap) -> bool:
    """Whether experts only have to be copied to where they are computed from."""
    return not any(layer.converted for layer in experts.layers)


def bounce_bytes(experts: ExpertMap) -> int:
    """Size of a reader's bounce buffer: one read takes an expert whole if it is not larger than BOUNCE_BYTES, or half
    of it where several readers share it."""
    record = max(layer.record_bytes for layer in experts.layers)
    shared = copies_out(experts) and record >= 2 * PART_BYTES
    return min(BOUNCE_BYTES, align(record // 2 if shared else record, BLOCK) + BLOCK)
