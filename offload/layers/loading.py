"""Load everything but the routed experts, through transformers' own `from_pretrained`.

While it builds the model, the experts' parameters turn into plain meta tensors, which are in no state dict:
transformers neither misses them nor allocates them. The dense tensors it gets from us, one at a time and only when it
asks: read from the shards into aligned memory of their own, never mapped; quantised ones as numbers. The weights of
linear layers that are to be quantised it does not get: they are filled in afterwards, a few rows at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging as hf_logging

from cache.errors import CheckpointError
from offload.checkpoint.dequantize import PackedTensor
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.parameter import TORCH_DTYPES, Piece
from offload.checkpoint.shards import TensorInfo
from offload.checkpoint.skeleton import expert_parameters
from offload.layers.embedding import EmbeddingOnDisk
from offload.layers.linear import DenseLinears
from offload.layers.rows import use_rows
from offload.store.files import FileReader

_BUILDING = threading.Lock()
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


class LazyTensor:
    """A tensor on disk that is read when it is indexed, as transformers' loader does with a safetensors slice."""

    def __init__(self, info: TensorInfo, on_read: Callable[[int], None] | None = None) -> None:
        self._info = info
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
        reader = FileReader(direct=False)
        try:
            reader.read([Piece(info.file, info.offset + start, nbytes, 0)], tensor.numpy().view(np.uint8))
        finally:
            reader.close()
        if self._on_read is not None:
            self._on_read(nbytes)
        return tensor.view(TORCH_DTYPES[info.dtype])


class LazyPacked:
    """A quantised weight, of which transformers sees the numbers: read and dequantised when it is indexed."""

    def __init__(self, packed: PackedTensor, on_read: Callable[[int], None] | None = None) -> None:
        self._packed = packed
        self._on_read = on_read

    @torch.no_grad()
    def __getitem__(self, index: Any) -> torch.Tensor:
        """The numbers. Raises TransferError when the disk does."""
        parts = [LazyTensor(part, self._on_read)[...] for part in self._packed.parts]
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
) -> Any:
    """The model of `folder` on `device`, its experts modules without weights. Calls `on_read` with bytes as it reads.

    Experts are computed by the function that transformers knows as `experts_implementation`. What `linears` names is
    quantised; `embedding` stays on disk, and is not open yet. Raises CheckpointError when a dense weight is missing or
    has another shape than the model's.
    """
    skeleton = experts.layers[0].model
    steps: dict[type[nn.Module], Callable[[nn.Module], None]] = {
        type(skeleton.get_submodule(layer.path)): _strip for layer in experts.layers
    }
    inside = {part.name for packed in experts.packed.values() for part in packed.parts}
    plain = {name: LazyTensor(info, on_read) for name, info in experts.dense.items() if name not in inside}
    matrices: dict[str, LazyTensor] = {}
    replaced: list[Callable[[nn.Module], None]] = []
    if linears is not None:
        matrices = {path: plain.pop(name) for path, name in linears.names.items()}
        replaced.append(linears.replace)
    if embedding is not None:
        del plain[embedding.name]
        replaced.append(embedding.replace)
    if replaced:
        steps[type(skeleton)] = partial(_replace, replaced)
    tensors: dict[str, LazyTensor | LazyPacked] = {**plain}
    tensors |= {name: LazyPacked(packed, on_read) for name, packed in experts.packed.items()}
    with _after_building(steps), _quiet_transformers():
        model, info = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            experts_implementation=experts_implementation,
            device_map=None if device.type == "cpu" else {"": device},
            ignore_mismatched_sizes=True,  # reported below, in one line
            output_loading_info=True,
        )
    _check_found(info, folder)
    for path, matrix in matrices.items():
        model.get_submodule(path).fill(matrix.rows)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    # Parameters keep `requires_grad`, as transformers loads them: torch folds a batched product with such a weight into
    # one matrix product and computes others one by one, with other last bits.
    use_rows(model)
    return model.eval()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the checkpoint in `folder`; None if it has none.

    Raises CheckpointError for one that cannot be loaded, or only with code that is not trusted.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file meets all kinds of parsers, some with errors of their own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {reason})") from error


def _check_found(info: Mapping[str, Any], folder: Path) -> None:
    """Whether transformers found every weight. Raises CheckpointError."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights of the model are not in the checkpoint, {missing[0]} for one: "
            "it is incomplete or of another model"
        )
    if info["mismatched_keys"]:
        name, on_disk, expected = next(iter(info["mismatched_keys"]))
        raise CheckpointError(
            f"{folder}: {name} is {tuple(on_disk)} on disk and {tuple(expected)} in the model: "
            "config.json and the weights do not belong together"
        )


@contextmanager
def _after_building(steps: Mapping[type[nn.Module], Callable[[nn.Module], None]]) -> Iterator[None]:
    """While active, each new module of one of these classes goes through the class's step."""
    with _BUILDING:
        originals = {cls: cls.__init__ for cls in steps}
        try:
            for cls, original in originals.items():
                cls.__init__ = _then(original, steps[cls])  # type: ignore[method-assign]
            yield
        finally:
            for cls, original in originals.items():
                cls.__init__ = original  # type: ignore[method-assign]


def _then(original: Callable[..., None], step: Callable[[nn.Module], None]) -> Callable[..., None]:
    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        step(self)

    return build


def _replace(parts: Iterable[Callable[[nn.Module], None]], model: nn.Module) -> None:
    for replace in parts:
        replace(model)


def _strip(experts: nn.Module) -> None:
    """Keep the module's expert parameters as plain meta tensors."""
    for name, parameter in expert_parameters(experts).items():
        delattr(experts, name)
        experts.__dict__[name] = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and its report of the expert weights it did not load, which is the point."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
