"""Which bytes on disk are expert (l, e): learnt from transformers' own conversion mapping.

transformers knows how every family's checkpoint turns into the model in memory: an ordered list of renamings, and
converters that merge the per-expert tensors of a layer into one [experts, ...] parameter. We run the same list over the
names in the shards' headers, but keep apart what each single expert is made of. Operations that never mix experts can
then run on one expert alone. Most checkpoints need none: their bytes, one tensor after the other, are already what the
parameter of one expert looks like, and are read straight into place. Where experts come quantised, their scales are
among what they are made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
)

from cache.errors import CheckpointError, UnsupportedFamilyError
from offload.checkpoint.config.file import ConfigFile
from offload.checkpoint.dequantize import (
    PLAIN,
    PackedTensor,
    dequantize_one,
    is_dequantization,
    is_scale,
    numbers_per_byte,
    scale_of,
    take_quantizer,
    unpack_bitsandbytes,
    work_bytes,
)
from offload.checkpoint.fit import NOT_TOGETHER, check_fit, check_kind, check_types, find_unused, name_unused
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.checkpoint.names import Names, sort_names
from offload.checkpoint.parameter import TORCH_DTYPES, ExpertParameter, Source, align
from offload.checkpoint.recipes import find_recipes
from offload.checkpoint.shards import ShardIndex, TensorInfo
from offload.checkpoint.skeleton import (
    build_skeleton,
    check_experts_implementation,
    count_experts,
    expert_parameters,
    find_experts,
    read_config,
    resolve_dtype,
)
from offload.checkpoint.unnamed_quantization import check_plain
from offload.checkpoint.wrappers import unwrap
from offload.system.text import one_line

_ANOTHER_FORM = "the checkpoint is incomplete, or quantised in a way that is not read: use its bf16 checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """What configuration and headers say of a checkpoint. `quantizer` is transformers' own for one that is quantised;
    `config` says nothing of that: in memory the model will not be. `file` is what it was read from."""

    file: ConfigFile
    config: Any
    dtype: torch.dtype
    skeleton: Any
    quantizer: Any
    experts: ExpertMap

    def on_disk(self, shards: ShardIndex) -> Checkpoint:
        """The same, in these shards."""
        return replace(self, experts=map_experts(self.skeleton, shards, self.quantizer))


def read_checkpoint(
    name: str, folder: Path, shards: ShardIndex, dtype: str = "auto", *, trust_remote_code: bool = False
) -> Checkpoint:
    """What the checkpoint called `name` is, from `folder`/config.json and the headers of its `shards`.

    Raises CheckpointError, ModelError, and what `map_experts` does.
    """
    file = ConfigFile.read(name, folder, own_code=trust_remote_code)
    with file.blamed():
        config = read_config(folder, trust_remote_code=trust_remote_code)
        check_experts_implementation(config)
        quantized = getattr(config, "quantization_config", None) is not None
        quantizer = take_quantizer(config, name)
        kinds = (TORCH_DTYPES[info.dtype] for info in shards.values() if info.dtype in PLAIN)
        # Of a quantised checkpoint the first may be a scale.
        on_disk = torch.bfloat16 if quantized else next(kinds, torch.float32)
        chosen = resolve_dtype(config, dtype, on_disk)
        skeleton = build_skeleton(config, chosen, trust_remote_code=trust_remote_code)
        return Checkpoint(file, config, chosen, skeleton, quantizer, map_experts(skeleton, shards, quantizer))


def map_experts(model: Any, shards: ShardIndex, quantizer: Any = None) -> ExpertMap:
    """Sort the tensors of `shards` into the experts of `model` (a skeleton) and the rest.

    `quantizer` is transformers' own, set to dequantise, for a checkpoint that comes quantised.
    Raises NotMoEError or UnsupportedFamilyError as `find_experts` does, UnsupportedFamilyError for a conversion that
    mixes experts, and CheckpointError for experts that are missing or of another shape than the model's.
    """
    modules = find_experts(model)
    strict = quantizer is not None
    targets = {f"{path}.{name}" for path, module in modules.items() for name in expert_parameters(module)}
    shards, wrapped = unwrap(shards, model.state_dict())
    names = sort_names(model, shards, quantizer, targets)
    if not strict:
        check_plain(shards, [name for name, _ in names.unmatched])
    check_types(shards[name] for members in names.members.values() for each in members.values() for name in each)
    layers = tuple(
        ExpertLayer(index, path, count_experts(module), _parameters(path, module, names, shards, model, strict), model)
        for index, (path, module) in enumerate(modules.items())
    )
    state = model.state_dict()
    packed = {
        name: weight
        for target, members in names.members.items()
        if target not in targets
        for name, weight in _pack(members, names.converters[target], state[target].dtype, shards, names.parts, strict)
    }
    dense = {name: shards[name] for name in names.dense}
    dense_names = {
        target: members[0]
        for target, members in names.unchanged.items()
        if len(members) == 1 and members[0] not in packed
    }
    parts = {part.name for weight in packed.values() for part in weight.parts} - packed.keys()
    recipes = find_recipes(model, [name for name in dense if name not in parts], targets)
    check_fit(model, shards, recipes, packed, targets)
    unused = find_unused(model, names.unmatched)
    notes = ([] if wrapped is None else [wrapped]) + ([name_unused(unused)] if unused else [])
    return ExpertMap(layers, dense, packed, dense_names, tuple(recipes), tuple(notes), shards.files)


def _parameters(
    path: str, module: Any, names: Names, shards: ShardIndex, model: Any, strict: bool
) -> tuple[ExpertParameter, ...]:
    """What the experts of one layer are made of, one parameter behind the other in a slot."""
    entries: list[ExpertParameter] = []
    offset = scratch = 0
    for name, parameter in expert_parameters(module).items():
        target = f"{path}.{name}"
        if target not in names.members:
            raise CheckpointError(f"the checkpoint holds no tensor for {target}: it is incomplete or of another model")
        members, converter = names.members[target], names.converters[target]
        _check_operations(converter, target, model.config.model_type)
        if any(member in names.parts for each in members.values() for member in each):
            raise UnsupportedFamilyError(
                f"{target} is stored in bitsandbytes 4-bit, which is read for dense weights only: use the model's "
                "bf16 checkpoint with --experts nf4, the same form"
            )
        sources = tuple(
            _source(pattern, [shards[member] for member in members[pattern]], parameter.shape[0], converter, target)
            for pattern in (members if converter is None else converter.source_patterns)
            if pattern in members
        )
        shape = tuple(parameter.shape[1:])
        entry = ExpertParameter(name, target, shape, parameter.dtype, offset, scratch, sources, converter)
        _check_numbers(entry, model, strict)
        entries.append(entry)
        offset = align(offset + entry.nbytes)
        if not entry.is_direct:
            scratch += entry.scratch_bytes
    return tuple(entries)


def _source(pattern: str, tensors: list[TensorInfo], experts: int, converter: Any, target: str) -> Source:
    merges = converter is not None and any(isinstance(op, MergeModulelist) for op in converter.operations)
    if not merges and len(tensors) == 1 and tensors[0].shape[:1] == (experts,):
        return Source(pattern, tuple(tensors), fused=True)
    if len(tensors) != experts:
        raise CheckpointError(
            f"{target} is made of {len(tensors)} tensors on disk, the model has {experts} experts: "
            "the checkpoint is incomplete or of another model"
        )
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
        raise CheckpointError(f"{target}: its experts differ in shape or dtype on disk")
    return Source(pattern, tuple(tensors), fused=False)


def _check_numbers(entry: ExpertParameter, model: Any, strict: bool) -> None:
    """Whether what is on disk makes what is in the model. With `strict` no type stands for numbers without scales."""
    tensors = {source.pattern: source.tensors[0] for source in entry.sources}
    weights = [pattern for pattern in tensors if not is_scale(pattern)]
    scales = [pattern for pattern in tensors if is_scale(pattern)]
    alone = [pattern for pattern in weights if scale_of(pattern) not in scales and tensors[pattern].dtype not in PLAIN]
    alone += set(scales).difference(map(scale_of, weights))
    if strict and alone:
        tensor = tensors[alone[0]]
        raise CheckpointError(f"{entry.target}: {tensor.name} ({tensor.dtype}) comes alone: {_ANOTHER_FORM}")
    if not entry.is_quantized:
        for source in entry.sources:
            check_kind(source.tensors[0], entry.dtype)
    # What the form and the steps make of these shapes the conversion itself says, on tensors without data.
    scratch = torch.empty(entry.scratch_offset + entry.scratch_bytes, dtype=torch.uint8, device="meta")
    try:
        made, reason = tuple(entry.made(scratch, model).shape), None
    except (RuntimeError, ValueError, AssertionError, KeyError) as error:
        made, reason = (), one_line(error)
    if made != (1, *entry.shape):
        on_disk = ", ".join(f"{source.pattern} {list(source.shape()[source.fused :])}" for source in entry.sources)
        raise CheckpointError(
            f"{entry.target}: what is on disk for one expert ({on_disk}) does not make {list(entry.shape)}"
            f"{f' ({reason})' if reason else ''}: {NOT_TOGETHER}"
        )


def _pack(
    members: Mapping[str, list[str]],
    converter: Any,
    dtype: torch.dtype,
    shards: ShardIndex,
    parts_of: Mapping[str, list[str]],
    strict: bool,
) -> Iterator[tuple[str, PackedTensor]]:
    """The quantised weights that a dense parameter in `dtype` is made of."""
    operation = None if converter is None else converter.operations[0]
    for pattern, weights in members.items():
        dequantized = operation is not None and is_dequantization(operation)
        if dequantized and is_scale(pattern):
            continue
        scales = members.get(scale_of(pattern), []) if dequantized else []
        for i, name in enumerate(weights):
            weight = shards[name]
            if name in parts_of:
                parts = (name, *parts_of[name])
                unpack = partial(unpack_bitsandbytes, parts, dtype)
                yield name, PackedTensor(tuple(shards[n] for n in parts), unpack, shape_is_inside=True)
            elif i < len(scales):
                scale = shards[scales[i]]
                try:
                    work_bytes(operation, weight.shape, scale.shape, numbers_per_byte(TORCH_DTYPES[weight.dtype]))
                except ValueError as error:
                    raise CheckpointError(f"{name}: {error}: {_ANOTHER_FORM}") from error
                yield name, PackedTensor((weight, scale), partial(_unpack, operation, dtype))
            elif strict and weight.dtype not in PLAIN and dtype.is_floating_point:
                raise CheckpointError(f"{name} ({weight.dtype}) has no scales: {_ANOTHER_FORM}")


def _unpack(operation: Any, dtype: torch.dtype, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    weight, scale = parts
    return dequantize_one(operation, weight, scale, dtype)


def _check_operations(converter: Any, target: str, family: str) -> None:
    """Refuse a conversion that does not work on one expert alone."""
    for operation in [] if converter is None else converter.operations:
        match operation:
            case MergeModulelist(dim=0):
                continue
            case _ if is_dequantization(operation):
                continue
            case Concatenate(dim=dim) | Interleave(dim=dim) if dim >= 1:
                continue
            case Transpose(dim0=first, dim1=second) if first >= 1 and second >= 1:
                continue
        raise UnsupportedFamilyError(
            f'the "{family}" family is not supported: the conversion step {type(operation).__name__} of {target} '
            "may mix experts, so one expert cannot be read alone"
        )
