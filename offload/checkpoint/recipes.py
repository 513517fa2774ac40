"""How the dense parameters are made of tensors on disk: transformers' own steps, run on shapes first, later on numbers.

What a recipe makes of tensors without data has the shapes that it will make of those on disk, so a plan knows whether
the weights fit the model before one of them is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import build_glob_alternation

from offload.checkpoint.names import resolve


@dataclass(frozen=True)
class Recipe:
    """What makes the parameter `target` (or several, of which it is the first) in `dtype`.

    sources: by transformers' pattern, the names on disk. `converter` is transformers' too, None for a tensor that is
    the parameter as it is.
    """

    target: str
    dtype: torch.dtype
    sources: Mapping[str, list[str]]
    converter: Any

    @property
    def names(self) -> list[str]:
        """All names on disk."""
        return [name for names in self.sources.values() for name in names]

    def make(self, read: Callable[[str], torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """The parameters of `model`, by name, from the tensors that `read` gives for names on disk."""
        if self.converter is None:
            return {self.target: read(self.names[0]).to(self.dtype)}
        converter = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, read(name).to(self.dtype))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def find_recipes(model: Any, names: Collection[str], experts: Collection[str]) -> list[Recipe]:
    """The recipes for what `model` (a skeleton) has besides `experts`, from the tensors on disk that have these `names`
    and are, or will be, numbers."""
    state = model.state_dict()
    plan = model._get_dtype_plan(model.config.dtype)  # what a family keeps at another type, whatever the rest has
    kept, by_group, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})
    sources: dict[str, dict[str, list[str]]] = {}
    converters: dict[str, Any] = {}
    for name, target, pattern, converter in resolve(model, state, names, None):
        if target in state and target not in experts:
            sources.setdefault(target, {}).setdefault(pattern or name, []).append(name)
            converters.setdefault(target, converter)
    found = []
    for target, of_patterns in sources.items():
        match = None if kept is None else kept.search(target)
        dtype = state[target].dtype if match is None else plan[by_group[match.lastgroup]]
        found.append(Recipe(target, dtype, of_patterns, converters[target]))
    return found
