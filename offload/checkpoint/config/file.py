"""config.json as what a stranger wrote: what transformers and torch say of it in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from cache.errors import CheckpointError, OffloadError
from offload.checkpoint.config.blame import culprits
from offload.checkpoint.config.json_object import read_json_object, shown
from offload.checkpoint.dequantize import take_quantizer
from offload.checkpoint.skeleton import build_skeleton, check_experts_implementation, find_experts, resolve_dtype
from offload.system.text import summary

_COUNTS = (
    (re.compile(r"(?:.*_)?layers?"), 1000, "layers"),
    (re.compile(r"(?:.*_)?num_labels"), 100_000, "labels"),
)
"""What transformers counts up to while it reads a configuration, and more than any model has."""
_LONGEST_REASON = 300


@dataclass(frozen=True)
class ConfigFile:
    """What config.json of the checkpoint called `name` says, as plain JSON; `own_code` comes with the model."""

    name: str
    fields: Mapping[str, Any]
    own_code: bool = False

    @classmethod
    def read(cls, name: str, folder: Path, *, own_code: bool = False) -> ConfigFile:
        """From `folder`. Raises CheckpointError as `read_json_object` does, and for absurd counts of layers."""
        fields = read_json_object(folder / "config.json", mark=False)  # transformers reads it, too, and takes none
        _check_counts(name, fields)
        return cls(name, fields, own_code)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Whatever the block raises is CheckpointError, with the field to blame where one can be found.

        Errors of this project, of the disk and of memory stay what they are.
        """
        try:
            yield
        except (OffloadError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers and torch meet bad values in all kinds of places
            if isinstance(error, OSError) and error.errno is not None:
                raise
            found = [] if self.own_code else culprits(self.fields, self._defaults(), self._try)
            where = " or ".join(f"{field} is {shown(value)}" for field, value in found)
            raise CheckpointError(
                f"{self.name}: its config.json cannot be used{': ' if where else ''}{where} ({_said(error)})"
            ) from error

    def _defaults(self) -> dict[str, Any]:
        """What the family says where this file says nothing."""
        try:
            defaults: dict[str, Any] = CONFIG_MAPPING[self.fields["model_type"]]().to_dict()
        except Exception:  # a type that nobody knows, or one without defaults
            return {}
        return defaults

    def _try(self, fields: Mapping[str, Any]) -> None:
        """Raises what a model with these `fields` raises while it is built, and in a short pass without data; and what
        one without experts does."""
        said = deepcopy(dict(fields))
        config: Any = CONFIG_MAPPING[said["model_type"]].from_dict(said)
        check_experts_implementation(config)
        take_quantizer(config, self.name)
        skeleton = build_skeleton(config, resolve_dtype(config, "auto"))
        with torch.no_grad():
            skeleton(input_ids=torch.zeros(1, 8, dtype=torch.long, device="meta"))
        find_experts(skeleton)


def _check_counts(name: str, fields: Mapping[str, Any], inside: str = "") -> None:
    """Raises CheckpointError for what would be counted up to for hours."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            _check_counts(name, value, f"{inside}{key}.")
        for pattern, most, what in _COUNTS:
            if isinstance(value, (int, float)) and value > most and pattern.fullmatch(key):
                raise CheckpointError(
                    f"{name}: its config.json cannot be used: {inside}{key} is {shown(value)}, and no model has more "
                    f"than {most} {what}"
                )


def _said(error: BaseException) -> str:
    """An exception in a few words and one line."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # what it found, without who found it
    text = summary(error)
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
