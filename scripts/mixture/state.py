"""A training run on disk: one safetensors file with weights, the optimiser's averages and, as JSON, where it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from offload.system.paths import fsync_folder

_AVERAGES = ("exp_avg", "exp_avg_sq")


def save(path: Path, model: Any, optimizer: torch.optim.Optimizer, step: int, settings: dict[str, Any]) -> None:
    """Write all that the rest of the run depends on, atomically: what was there stays until the new file is whole."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        tensors[name] = weight.detach()
        if weight in optimizer.state:
            tensors |= {f"{part} {name}": optimizer.state[weight][part] for part in _AVERAGES}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, {"step": str(step), "settings": json.dumps(settings)})
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)
    fsync_folder(path.parent)


def load(path: Path, model: Any, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> int:
    """Put a saved run into `model` and `optimizer`; returns the steps it has done, 0 where nothing is saved.

    Raises SystemExit where the run was begun with other settings.
    """
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        said: dict[str, str] = file.metadata()
    begun = json.loads(said["settings"])
    if begun != settings:
        other = sorted(key for key in begun | settings if begun.get(key) != settings.get(key))
        raise SystemExit(f"{path} was begun with another {', '.join(other)}: go on with the same, or delete it")
    tensors = load_file(path)
    step = int(said["step"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[name])
            if f"{_AVERAGES[0]} {name}" in tensors:
                averages = {part: tensors[f"{part} {name}"] for part in _AVERAGES}
                optimizer.state[weight] = {"step": torch.tensor(float(step)), **averages}
    return step
