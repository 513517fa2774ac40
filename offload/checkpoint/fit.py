"""Whether the tensors on disk are those of the model: every name, shape and kind of type, before one is read.

What does not fit is refused. What the model has no place for, and is not known to be harmless, is named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from cache.errors import CheckpointError
from offload.checkpoint.dequantize import PackedTensor
from offload.checkpoint.parameter import TORCH_DTYPES
from offload.checkpoint.recipes import Recipe
from offload.checkpoint.shards import ShardIndex, TensorInfo
from offload.system.text import one_line

NOT_TOGETHER = "config.json and the weights do not belong together"
_NAMED = 3
_OF_ACTIVATIONS = re.compile(r"\.(input|activation|output|q|k|v)_scale$")  # for products and caches in FP8
_PREDICTS_AHEAD = re.compile(r"(^|\.)(mtp|mtp_layers|nextn)\.")


def check_fit(
    model: Any,
    shards: ShardIndex,
    recipes: Iterable[Recipe],
    packed: Mapping[str, PackedTensor],
    experts: Collection[str],
) -> None:
    """Compare what `recipes` make of the tensors in `shards` with the dense parameters of `model` (a skeleton).

    `packed` are the quantised ones. Raises CheckpointError for what is missing, or of another shape or kind of type.
    """
    state = model.state_dict()
    made: set[str] = set()
    for recipe in recipes:
        for name in recipe.names:
            if name not in packed:
                check_kind(shards[name], state[recipe.target].dtype)
        shapes = _shapes(recipe, model, shards, packed)
        for name, shape in shapes.items():
            if name in state and shape is not None and shape != tuple(state[name].shape):
                first = shards[recipe.names[0]]
                on_disk = list(shape) if recipe.converter is None else f"{list(shape)} from what is"
                raise CheckpointError(
                    f"{first.file}: {name} is {on_disk} on disk and {list(state[name].shape)} in the model: "
                    f"{NOT_TOGETHER}"
                )
        made |= shapes.keys()
    _check_missing(model, made, experts, shards)


def check_types(tensors: Iterable[TensorInfo]) -> None:
    """Raises CheckpointError for a type that is not read."""
    for info in tensors:
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{info.file}: {info.name} is stored as {info.dtype}, which is not read: use its bf16 checkpoint"
            )


def check_kind(info: TensorInfo, dtype: torch.dtype) -> None:
    """Raises CheckpointError for integers where the model has fractions in `dtype`, and the other way round."""
    if TORCH_DTYPES[info.dtype].is_floating_point != dtype.is_floating_point:
        raise CheckpointError(
            f"{info.file}: {info.name} is {info.dtype} on disk and {str(dtype).removeprefix('torch.')} in the model: "
            f"{NOT_TOGETHER}"
        )


def _shapes(
    recipe: Recipe, model: Any, shards: ShardIndex, packed: Mapping[str, PackedTensor]
) -> dict[str, tuple[int, ...] | None]:
    """What the recipe makes; None for a shape that only the bytes say, as bitsandbytes' do."""

    def empty(name: str) -> torch.Tensor:
        if name in packed:
            return packed[name].unpack([_on_meta(part) for part in packed[name].parts])
        return _on_meta(shards[name])

    if any(packed[name].shape_is_inside for name in recipe.names if name in packed):
        return {recipe.target: None}
    try:
        return {name: tuple(tensor.shape) for name, tensor in recipe.make(empty, model).items()}
    except (RuntimeError, ValueError, AssertionError, IndexError, KeyError, TypeError) as error:
        shapes = ", ".join(str(list(shards[name].shape)) for name in recipe.names[:_NAMED])
        raise CheckpointError(
            f"{shards[recipe.names[0]].file}: {recipe.names[0]} is {shapes} on disk, which does not make "
            f"{recipe.target} ({one_line(error)}): {NOT_TOGETHER}"
        ) from error


def _on_meta(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")


def _check_missing(model: Any, made: Collection[str], experts: Collection[str], shards: ShardIndex) -> None:
    """Where several names are one parameter, as by a tied output head, one of them is enough."""
    parameters = model.state_dict(keep_vars=True)
    there = {id(parameters[name]) for name in made if name in parameters}
    missing = {name for name, of in parameters.items() if id(of) not in there and name not in experts}
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = {name for name in missing if not any(re.search(pattern, name) for pattern in patterns)}
    if not missing:
        return
    where = "" if shards.folder is None else f"{shards.folder}: "
    head = model.get_output_embeddings()
    if head is not None and all(parameters[name] is head.weight for name in missing) and len(missing) == 1:
        raise CheckpointError(
            f"{where}1 weights of the model are not in the checkpoint, {min(missing)} for one: where the output head "
            'is the embedding, set "tie_word_embeddings": true in config.json; else the checkpoint is incomplete'
        )
    raise CheckpointError(
        f"{where}{len(missing)} weights of the model are not in the checkpoint, {min(missing)} for one: "
        "it is incomplete or of another model"
    )


def find_unused(model: Any, unmatched: Iterable[tuple[str, str]]) -> list[str]:
    """Of tensors (name on disk, name in the model) that `model` has no place for, those not known to be harmless."""
    buffers = [name for name, _ in model.named_buffers()]
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    harmless = re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)) or r"(?!)")
    ahead = _layers_ahead(model.config.get_text_config())
    return [
        name
        for name, target in unmatched
        if not any(known.search(name) for known in (_OF_ACTIVATIONS, _PREDICTS_AHEAD))
        and not harmless.search(target)
        and not _is_ahead(name, ahead)
    ]


def name_unused(names: Sequence[str]) -> str:
    """One line for tensors that are not used, those of all layers together."""
    alike = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    named = [f"{name} ({count})" if count > 1 else name for name, count in alike.most_common(_NAMED)]
    more = f" and {len(alike) - _NAMED} more" if len(alike) > _NAMED else ""
    return (
        f"{len(names)} tensors of the checkpoint have no place in the model and are not used: {', '.join(named)}{more}"
    )


def _layers_ahead(config: Any) -> range:
    """The layers behind the last that predict further tokens, which generation does not use."""
    first = getattr(config, "num_hidden_layers", 0)
    count = getattr(config, "num_nextn_predict_layers", 0)
    return range(first, first + count) if isinstance(first, int) and isinstance(count, int) else range(0)


def _is_ahead(name: str, layers: range) -> bool:
    match = re.search(r"(^|\.)layers\.(\d+)\.", name)
    return match is not None and int(match[2]) in layers
