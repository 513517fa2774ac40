"""What the tensors on disk are called in the model: transformers' own renamings, run over the names in headers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from offload.checkpoint.dequantize import bitsandbytes_parts

_OF_ACTIVATIONS = "activation_scale"  # for products in FP8, which are not computed here


@dataclass(frozen=True)
class Names:
    """The names of tensors on disk, in natural order, and of the model's parameters that they become.

    members: by parameter, what it is made of: the tensors that each source pattern of its converter matched.
    converters: by parameter, transformers' steps from its members to it; None where a tensor is it already.
    dense: the tensors that belong to no expert.
    unchanged: by dense parameter, the tensors that are it as they are.
    parts: by weight in bitsandbytes' 4 bits, what else was saved of it.
    unmatched: what the model has no place for, by its name on disk and by the one it would have there.
    """

    members: Mapping[str, Mapping[str, list[str]]]
    converters: Mapping[str, Any]
    dense: list[str]
    unchanged: Mapping[str, list[str]]
    parts: Mapping[str, list[str]]
    unmatched: list[tuple[str, str]]


def sort_names(model: Any, shards: Collection[str], quantizer: Any, experts: Collection[str]) -> Names:
    """Of the tensors `shards`. `experts` are the parameters of `model` (a skeleton) that hold experts."""
    state = model.state_dict()
    parts = bitsandbytes_parts(shards)
    unused = {part for of_weight in parts.values() for part in of_weight}
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    converters: dict[str, Any] = {}
    dense: list[str] = []
    unchanged: dict[str, list[str]] = defaultdict(list)
    unmatched: list[tuple[str, str]] = []
    for name, target, pattern, converter in resolve(model, state, shards, quantizer):
        if target not in experts:
            dense.append(name)
            if converter is None:
                unchanged[target].append(name)
        if name in unused or (pattern or "").endswith(_OF_ACTIVATIONS):
            continue
        if target in state:
            members[target][pattern or name].append(name)
            converters[target] = converter
        else:
            unmatched.append((name, target))
    by_target = {target: dict(each) for target, each in members.items()}
    return Names(by_target, converters, dense, dict(unchanged), parts, unmatched)


def resolve(
    model: Any, state: Mapping[str, Any], shards: Collection[str], quantizer: Any
) -> list[tuple[str, str, str | None, Any]]:
    """For each tensor on disk: (name, name in the model, converter's source pattern, converter)."""
    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    resolved = []
    for name in sorted(shards, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        resolved.append((name, target, pattern, by_pattern[pattern] if pattern is not None else None))
    return resolved
