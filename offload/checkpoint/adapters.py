"""What holds an adapter, such as LoRA's: alone it is no model, and beside one it is not used."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cache.errors import CheckpointError
from offload.checkpoint.config.json_object import read_json_object

_CONFIG_NAME = "adapter_config.json"
_WEIGHTS = "adapter_model"


def without_adapter(shards: Collection[str]) -> set[str]:
    """Those of `shards` that are not an adapter's weights."""
    return {name for name in shards if not name.startswith(_WEIGHTS)}


def adapter_alone(names: Collection[str], folder: Path | None = None) -> str | None:
    """What to say of files `names` without a model; None if there is no adapter among them."""
    if _CONFIG_NAME not in names and len(without_adapter(names)) == len(names):
        return None
    return f"it holds an adapter alone and no model: load its base model{_base(folder)} or one that it is merged into"


def adapter_beside(folder: Path) -> tuple[str, ...]:
    """A note where an adapter lies beside a model's weights."""
    if not (folder / _CONFIG_NAME).is_file():
        return ()
    return (f"the adapter beside the weights ({_CONFIG_NAME}) is not used: merge it into the model if it should be",)


def _base(folder: Path | None) -> str:
    """The base model as the adapter names it, in front of what follows; empty if it does not."""
    try:
        base = None if folder is None else read_json_object(folder / _CONFIG_NAME).get("base_model_name_or_path")
    except CheckpointError:  # that it is an adapter is said without it
        base = None
    return f" ({base})" if base and isinstance(base, str) else ""
