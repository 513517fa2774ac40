"""What `offload calibrate` stores of a model, and how a model's calibration is found again.

It is measured in `offload/quality/`: how gates' inputs change from layer to layer, and what experts matter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cache.errors import TraceError
from cache.traces.tensorfile import Column, read_tensors, row_blocks, write_tensors
from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertMap
from offload.layers.router import router_beside
from offload.system.paths import calibration_path

_FORMAT = "offload-calibration"
_SUPER_PERCENTILE, _SUPER_SHARE = 99.5, 0.1
_OPTIONAL = {"maxima": 2, "sensitivity": 1, "importance": 2, "unscaled_sensitivity": 1}
"""What older files lack, and how many dimensions it has."""


@dataclass(frozen=True)
class Calibration:
    """What was measured of one model."""

    fingerprint: str
    """Of the model: `gates_fingerprint`."""
    offsets: NDArray[np.float32]
    """[L - 1, H]: the input of gate l + 1 less that of gate l, averaged over tokens."""
    metadata: Mapping[str, str]
    """What it was measured on, as text."""
    maxima: NDArray[np.float32] | None = None
    """[L, E]: the largest absolute value that an expert gave, zero where it was not used. None in older files."""
    sensitivity: NDArray[np.float32] | None = None
    """[L]: AdapMoE's w_l: nats lost when a layer's lowest-weighted expert is dropped and the others take over its
    weight, over its squared share of the weights. None where it was not measured."""
    importance: NDArray[np.float32] | None = None
    """[L, E]: nats lost per token, to first order, if an expert alone gave noise as large as its output. Made to
    order experts by; the amount is rough, above all where routers are undecided. None where it was not measured."""
    unscaled_sensitivity: NDArray[np.float32] | None = None
    """[L]: as `sensitivity`, where the others keep their weights. None in older files, too."""

    @property
    def super_experts(self) -> frozenset[ExpertKey]:
        """The few experts whose extreme outputs the whole model leans on (arXiv:2507.23279).

        Those whose largest output is above the 99.5th percentile of all experts' and at least 10 % of the largest. The
        paper also asks that massive activations form in their layer. We do not: one expert in two hundred at most is
        found, and to treat one too many with care costs next to nothing, to miss one costs the model.
        """
        if self.maxima is None:
            return frozenset()
        most = np.percentile(self.maxima, _SUPER_PERCENTILE), _SUPER_SHARE * self.maxima.max()
        found = (self.maxima > most[0]) & (self.maxima >= most[1])
        return frozenset(ExpertKey(int(layer), int(expert)) for layer, expert in np.argwhere(found))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Store it at `path`, atomically. Raises OutputError and DiskSpaceError."""
        arrays = {name: getattr(self, name) for name in ("offsets", *_OPTIONAL) if getattr(self, name) is not None}
        columns = {name: Column(np.float32, array.shape, row_blocks(array)) for name, array in arrays.items()}
        kept = {**self.metadata, "format": _FORMAT, "version": "1", "fingerprint": self.fingerprint}
        write_tensors(path, columns, kept)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Calibration:
        """What `write` stored. Raises TraceError for a file that is none, and OSError."""
        arrays, metadata = read_tensors(path)
        if metadata.get("format") != _FORMAT or metadata.get("version") != "1" or "fingerprint" not in metadata:
            raise TraceError(f"{path} is not what `offload calibrate` stores: run it again")
        dimensions = {"offsets": 2, **_OPTIONAL}
        kept = {name: np.array(arrays[name]) for name in dimensions if name in arrays}
        whole = all(a.ndim == dimensions[n] and a.dtype == np.float32 and np.isfinite(a).all() for n, a in kept.items())
        if "offsets" not in kept or not whole:
            raise TraceError(f"{path} is damaged: run `offload calibrate` again")
        return cls(metadata["fingerprint"], kept.pop("offsets"), metadata, **kept)


def find_calibration(model: nn.Module, experts: ExpertMap) -> Calibration | None:
    """What `offload calibrate` stored of this very model, if it did. Raises TraceError for a damaged file."""
    fingerprint = gates_fingerprint(model, experts)
    path = calibration_path(fingerprint)
    return Calibration.read(path) if path.is_file() else None


def gates_fingerprint(model: nn.Module, experts: ExpertMap) -> str:
    """A digest of the routers' weights: models that share it have gates that say the same."""
    digest = hashlib.blake2b(digest_size=16)
    for layer in experts.layers:
        _, router = router_beside(model, layer)
        for name, tensor in sorted(({} if router is None else router.state_dict()).items()):
            digest.update(f"{layer.index} {name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
