"""How often a model has used each of its experts, kept from run to run beside its calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cache.errors import TraceError
from cache.traces.tensorfile import Column, read_tensors, row_blocks, write_tensors
from offload.checkpoint.layout import ExpertMap
from offload.layers.calibration import gates_fingerprint
from offload.system.paths import own_place, uses_path

_FORMAT = "offload-uses"


def find_uses(model: nn.Module, experts: ExpertMap) -> NDArray[np.int64] | None:
    """Uses [L, E] by this very model in the runs before, each run counting half as much as the one after it; None where
    nothing was kept, or what was kept is damaged."""
    return _read(uses_path(gates_fingerprint(model, experts)), experts)


def add_uses(model: nn.Module, experts: ExpertMap, uses: NDArray[np.int64]) -> None:
    """Keep `uses` [L, E] of a run, and half of what was kept before. Raises OSError, OutputError and DiskSpaceError."""
    path = own_place(uses_path(gates_fingerprint(model, experts)))
    before = _read(path, experts)
    total = uses if before is None else uses + before // 2
    write_tensors(path, {"uses": Column(np.int64, total.shape, row_blocks(total))}, {"format": _FORMAT, "version": "1"})


def _read(path: Path, experts: ExpertMap) -> NDArray[np.int64] | None:
    if not path.is_file():
        return None
    try:
        arrays, metadata = read_tensors(path)
    except TraceError:
        return None
    uses = arrays.get("uses")
    shape = len(experts.layers), experts.num_experts
    if metadata.get("format") != _FORMAT or uses is None or uses.shape != shape or uses.dtype != np.int64:
        return None
    return np.array(uses)
