"""Which bytes on disk are expert (l, e): learnt from transformers' own conversion mapping.

transformers knows how every family's checkpoint turns into the model in memory: an ordered list of renamings, and
converters that merge the per-expert tensors of a layer into one [experts, ...] parameter. We run the same list over the
names in the shards' headers, but keep apart what each single expert is made of. Operations that never mix experts can
then run on one expert alone. Most checkpoints need none: their bytes, one tensor after the other, are already what the
parameter of one expert looks like, and are read straight into place.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from cache.errors import CheckpointError, UnsupportedFamilyError
from offload.layout import ExpertLayer, ExpertMap, ExpertParameter, Source, align
from offload.shards import ShardIndex, TensorInfo
from offload.skeleton import count_experts, expert_parameters, find_experts


def map_experts(model: Any, shards: ShardIndex, quantizer: Any = None) -> ExpertMap:
    """Sort the tensors of `shards` into the experts of `model` (a skeleton) and the rest.

    Raises NotMoEError or UnsupportedFamilyError as `find_experts` does, UnsupportedFamilyError for a conversion that
    mixes experts, and CheckpointError for experts that are missing or of another shape than the model's.
    """
    modules = find_experts(model)
    parameters = {
        f"{path}.{name}": parameter
        for path, module in modules.items()
        for name, parameter in expert_parameters(module).items()
    }
    names: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    converters: dict[str, Any] = {}
    dense: dict[str, TensorInfo] = {}
    unchanged: dict[str, list[str]] = defaultdict(list)
    for name, target, pattern, converter in _resolve_names(model, shards, quantizer):
        if target in parameters:
            names[target][pattern or name].append(name)
            converters[target] = converter
        else:
            dense[name] = shards[name]
            if converter is None:
                unchanged[target].append(name)

    layers: list[ExpertLayer] = []
    for path, module in modules.items():
        offset = scratch = 0
        entries = []
        for name, parameter in expert_parameters(module).items():
            target = f"{path}.{name}"
            if target not in names:
                raise CheckpointError(
                    f"the checkpoint holds no tensor for {target}: it is incomplete or of another model"
                )
            converter = converters[target]
            _check_operations(converter, target, model.config.model_type)
            sources = tuple(
                _source(pattern, [shards[n] for n in members], parameter.shape[0], converter, target)
                for pattern, members in _in_pattern_order(names[target], converter)
            )
            entry = ExpertParameter(
                name, target, tuple(parameter.shape[1:]), parameter.dtype, offset, scratch, sources, converter
            )
            on_disk, in_model = entry.source_elements, torch.Size(entry.shape).numel()
            if on_disk != in_model:
                raise CheckpointError(
                    f"{target}: one expert has {on_disk} numbers on disk and {in_model} in the model: "
                    "config.json and the weights do not belong together"
                )
            entries.append(entry)
            offset = align(offset + entry.nbytes)
            if not entry.is_direct:
                scratch += sum(align(source.piece(0, 0).nbytes) for source in sources)
        layers.append(ExpertLayer(len(layers), path, count_experts(module), tuple(entries), model))
    dense_names = {target: members[0] for target, members in unchanged.items() if len(members) == 1}
    return ExpertMap(tuple(layers), dense, dense_names)


def _resolve_names(model: Any, shards: ShardIndex, quantizer: Any) -> list[tuple[str, str, str | None, Any]]:
    """For each tensor on disk, in natural order: (name, name in the model, converter's source pattern, converter)."""
    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    resolved = []
    for name in sorted(shards, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        resolved.append((name, target, pattern, by_pattern[pattern] if pattern is not None else None))
    return resolved


def _in_pattern_order(members: dict[str, list[str]], converter: Any) -> list[tuple[str, list[str]]]:
    if converter is None:
        return list(members.items())
    return [(pattern, members[pattern]) for pattern in converter.source_patterns if pattern in members]


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


def _check_operations(converter: Any, target: str, family: str) -> None:
    """Refuse a conversion that does not work on one expert alone."""
    for operation in [] if converter is None else converter.operations:
        match operation:
            case MergeModulelist(dim=0):
                continue
            case Concatenate(dim=dim) | Interleave(dim=dim) if dim >= 1:
                continue
            case Transpose(dim0=first, dim1=second) if first >= 1 and second >= 1:
                continue
        raise UnsupportedFamilyError(
            f'the "{family}" family is not supported: the conversion step {type(operation).__name__} of {target} '
            "may mix experts, so one expert cannot be read alone"
        )
