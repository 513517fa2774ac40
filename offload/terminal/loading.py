"""What commands load before they do anything: a model, with its progress shown, and a machine's profile."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache.errors import ProfileError
from offload.costs.machine import MachineProfile
from offload.options import LoadOptions
from offload.system.messages import notice
from offload.system.paths import machine_profile_path
from offload.terminal.console import waiting


def load_model(model: str | Path, options: LoadOptions) -> Any:
    """An OffloadedModel, with progress on a terminal. Raises OffloadError."""
    with waiting("starting"):
        from offload.model import OffloadedModel

    return OffloadedModel.from_pretrained(model, **asdict(options), progress=sys.stderr.isatty())


def find_profile(path: Path | None) -> MachineProfile | None:
    """The machine profile in `path`, or what `offload profile` stored; None if it has not, or what it stored cannot be
    read any more, which is said. Raises ProfileError for a `path` that is no profile."""
    if path is not None:
        return MachineProfile.read(path)
    if not machine_profile_path().exists():
        return None
    try:
        return MachineProfile.read(machine_profile_path())
    except ProfileError as error:
        notice(error)
        return None
