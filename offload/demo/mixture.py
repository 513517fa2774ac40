"""The mixture: a small Mixture of Experts trained from scratch, and a trace of how it routes; docs/mixture.md.

Both are package data. scripts/mixture/main.py makes them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cache.errors import CheckpointError
from offload.demo.built import built

WEIGHTS = Path(__file__).parent / "mixture-int8.safetensors"
TRACE = Path(__file__).parent / "mixture-trace.safetensors"
"""All scores, what the gates of the next three layers say, and the tokens of held-out text that anyone may use."""

LAYOUT = "1"  # raise it when the same weights must be written anew
CHECKPOINT_BYTES = 20_000_000


def mixture_path(progress: bool = False) -> Path:
    """The folder of the mixture's checkpoint, written first if it is not there (seconds).

    `progress` says on stderr that another process writes it. Raises UnknownModelError when the cache folder cannot be
    written, DiskSpaceError when there is too little room, CheckpointError for package data of another version.
    """
    if not WEIGHTS.is_file():
        raise CheckpointError(f"{WEIGHTS} is not there: reinstall offload")
    return built("mixture", _fingerprint(), CHECKPOINT_BYTES, _write, progress=progress)


def _fingerprint() -> str:
    """12 hex digits that change with the weights and with what is written of them."""
    return hashlib.sha256(LAYOUT.encode() + WEIGHTS.read_bytes()).hexdigest()[:12]


def _write(folder: Path, scratch: Path) -> None:
    from offload.demo.int8 import unpack

    unpack(WEIGHTS, folder)
