"""Load everything but the routed experts, as transformers' own `from_pretrained` does.

In a model of our own, without numbers, the experts' parameters turn into plain meta tensors, which are in no state
dict: nothing misses them or allocates them. Dense tensors are read from the shards into aligned memory of their own,
never mapped; quantised ones as numbers. The weights of linear layers that are to be quantised are filled in afterwards,
a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from offload.checkpoint.building import build
from offload.checkpoint.config.generation import read_generation_config
from offload.checkpoint.dequantize import PackedTensor
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.parameter import TORCH_DTYPES, Piece
from offload.checkpoint.shards import TensorInfo
from offload.checkpoint.skeleton import expert_parameters
from offload.layers.attention import use_grouped_attention
from offload.layers.embedding import EmbeddingOnDisk
from offload.layers.filling import fill
from offload.layers.heads import use_heads
from offload.layers.linear import DenseLinears
from offload.layers.norms import use_norms
from offload.layers.products import use_products
from offload.layers.router_products import use_router_products
from offload.layers.routing import use_routing
from offload.layers.sinks import use_sinks
from offload.layers.sublayer import use_sublayers
from offload.store.files import FileReader
from offload.system.seen import SeenFile


class LazyTensor:
    """A tensor on disk that is read when it is indexed, as transformers' loader does with a safetensors slice.

    `files` says what was seen of the files.
    """

    def __init__(
        self, info: TensorInfo, files: Mapping[str, SeenFile], on_read: Callable[[int], None] | None = None
    ) -> None:
        self._info = info
        self._files = files
        self._on_read = on_read

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The tensor, in fresh memory aligned to 64 bytes. Raises TransferError when the disk does."""
        return self._read(0, self._info.nbytes).view(self._info.shape)[index]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows first to last (exclusive) of a tensor with two dimensions; nothing else is read."""
        count, width = self._info.shape
        row_bytes = self._info.nbytes // count
        return self._read(first * row_bytes, (last - first) * row_bytes).view(last - first, width)

    def _read(self, start: int, nbytes: int) -> torch.Tensor:
        info = self._info
        tensor = torch.empty(nbytes, dtype=torch.uint8)
        reader = FileReader(direct=False, seen=self._files)
        try:
            reader.read([Piece(info.file, info.offset + start, nbytes, 0)], tensor.numpy().view(np.uint8))
        finally:
            reader.close()
        if self._on_read is not None:
            self._on_read(nbytes)
        return tensor.view(TORCH_DTYPES[info.dtype])


class LazyPacked:
    """A quantised weight, of which transformers sees the numbers: read and dequantised when it is indexed."""

    def __init__(
        self, packed: PackedTensor, files: Mapping[str, SeenFile], on_read: Callable[[int], None] | None = None
    ) -> None:
        self._packed = packed
        self._files = files
        self._on_read = on_read

    @torch.no_grad()
    def __getitem__(self, index: Any) -> torch.Tensor:
        """The numbers. Raises TransferError when the disk does."""
        parts = [LazyTensor(part, self._files, self._on_read)[...] for part in self._packed.parts]
        return self._packed.unpack(parts)[index]


def load_dense(
    folder: Path,
    config: Any,
    experts: ExpertMap,
    dtype: torch.dtype,
    device: torch.device,
    experts_implementation: str,
    on_read: Callable[[int], None] | None = None,
    linears: DenseLinears | None = None,
    embedding: EmbeddingOnDisk | None = None,
    *,
    exact: bool = True,
) -> Any:
    """The model of `folder` on `device`, its experts modules without weights. Calls `on_read` with bytes as it reads.

    Experts are computed by the function that transformers knows as `experts_implementation`. What `linears` names is
    quantised; `embedding` stays on disk, and is not open yet. With `exact`, plain products have the bits of torch's.
    Nothing outside the model changes: other threads may load and run others meanwhile. Raises TransferError when the
    disk does, and CheckpointError for a generation_config.json that cannot be used.
    """
    generation = read_generation_config(folder)
    skeleton = experts.layers[0].model
    model = build(type(skeleton), deepcopy(config), dtype, experts_implementation)
    for layer in experts.layers:
        _strip(model.get_submodule(layer.path))
    files = experts.files
    inside = {part.name for packed in experts.packed.values() for part in packed.parts}
    tensors: dict[str, LazyTensor | LazyPacked] = {}
    tensors |= {name: LazyTensor(info, files, on_read) for name, info in experts.dense.items() if name not in inside}
    tensors |= {name: LazyPacked(packed, files, on_read) for name, packed in experts.packed.items()}
    matrices: dict[str, LazyTensor] = {}
    apart: set[str] = set()
    if linears is not None:
        matrices = {path: LazyTensor(experts.dense[name], files, on_read) for path, name in linears.names.items()}
        apart.update(linears.names.values())
        linears.replace(model)
    if embedding is not None:
        apart.add(embedding.name)
        embedding.replace(model)
    fill(model, [recipe for recipe in experts.recipes if apart.isdisjoint(recipe.names)], tensors, device)
    if linears is not None:
        linears.settle(model)
    for path, matrix in matrices.items():
        model.get_submodule(path).fill(matrix.rows)
    if generation is not None:
        model.generation_config = generation
    # Parameters keep `requires_grad`, as transformers loads them: torch folds a batched product with such a weight into
    # one matrix product and computes others one by one, with other last bits.
    use_products(model, exact=exact)
    if not exact and device.type == "cpu":
        use_grouped_attention(model)
        use_sinks(model)
        use_norms(model)
        use_heads(model)
        use_sublayers(model)
        use_router_products(model, experts)
        use_routing(model, experts)
    return model.eval()


def _strip(experts: nn.Module) -> None:
    """Keep the module's expert parameters as plain meta tensors."""
    for name, parameter in expert_parameters(experts).items():
        delattr(experts, name)
        experts.__dict__[name] = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
