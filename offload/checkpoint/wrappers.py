"""Names of tensors as what was wrapped around a model left them: parallel, compiled, or with an adapter merged in."""

from __future__ import annotations

import re
from collections.abc import Collection

from offload.checkpoint.shards import ShardIndex

_AROUND = re.compile(r"^(?:(?:module|base_model\.model)\.)+")
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrap(shards: ShardIndex, model_names: Collection[str]) -> tuple[ShardIndex, str | None]:
    """`shards` by the names that the model itself gives, and a line that says what was left out; None if nothing was.

    Nothing is where the model's own parameters are called so, or two tensors would have one name.
    """
    inner = {name: _inner(name) for name in shards}
    changed = [name for name in shards if inner[name] != name]
    if not changed or len(set(inner.values())) < len(inner) or any(_inner(name) != name for name in model_names):
        return shards, None
    first = changed[0]
    line = f'{len(changed)} tensors are named as if wrapped, such as "{first}": read as "{inner[first]}"'
    renamed = {inner[name]: info for name, info in shards.items()}
    return ShardIndex(renamed, shards.file_sizes, shards.folder, shards.files), line


def _inner(name: str) -> str:
    """`name` without what was around the model, or around a part of it, in any order."""
    without = _AROUND.sub("", _INSIDE.sub("", name))
    return without if without else name
