"""Put numbers into a model that was built without: what the disk has, and what its own code computes.

These are the steps of transformers' loader, on one module tree: other models, other threads, its log and its progress
bars see nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from cache.errors import CheckpointError
from offload.checkpoint.building import tie
from offload.checkpoint.fit import NOT_TOGETHER
from offload.checkpoint.recipes import Recipe

_READERS = 4  # as many as transformers has


class OnDisk(Protocol):
    """A tensor that is read when it is indexed."""

    def __getitem__(self, index: Any) -> torch.Tensor: ...


def fill(model: Any, recipes: Sequence[Recipe], tensors: Mapping[str, OnDisk], device: torch.device) -> None:
    """Make the parameters of `model` (on the meta device) by `recipes` from `tensors`, on `device`.

    What shares another's weight is tied to it, what the model computes for itself is computed.
    Raises TransferError when the disk does, CheckpointError for a shape that only the bytes said.
    """

    def read(name: str) -> torch.Tensor:
        return tensors[name][...]

    missing = set(model.state_dict())
    pool = ThreadPoolExecutor(_READERS, thread_name_prefix="offload-load")
    try:
        for made in pool.map(lambda recipe: recipe.make(read, model), recipes):
            for name, tensor in made.items():
                _put(model, name, tensor.to(device))
                missing.discard(name)
    finally:
        pool.shutdown(cancel_futures=True)
    info, places = LoadStateDictInfo(missing, set(), set(), [], {}, set()), {"": device}
    model.mark_tied_weights_as_initialized(info)
    model._move_missing_keys_from_meta_to_device(info.missing_keys, places, None, None)
    with torch.no_grad(), _KeepsWhatWasRead():
        _initialise(model, model)
    tie(model, info.missing_keys)


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    place = getattr(module, last)
    if place.shape != tensor.shape:
        raise CheckpointError(
            f"{name} is {list(tensor.shape)} on disk and {list(place.shape)} in the model: {NOT_TOGETHER}"
        )
    if last not in module._buffers:
        tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    setattr(module, last, tensor)


def _initialise(module: nn.Module, model: Any) -> None:
    """What transformers' `initialize_weights` does to `module`, a part of `model`, without changing torch's functions
    for all threads meanwhile."""
    for child in module.children():
        _initialise(child, child if isinstance(child, PreTrainedModel) else model)
    model._initialize_weights(module, model.is_custom_code())


class _KeepsWhatWasRead(TorchFunctionMode):
    """While active, in this thread, nothing writes to a tensor that came from the disk."""

    def __torch_function__(
        self, func: Any, types: Iterable[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name: str = getattr(func, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__")
        if writes and args and getattr(args[0], "_is_hf_initialized", False):
            return args[0]
        return func(*args, **(kwargs or {}))
