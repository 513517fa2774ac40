"""What commands load before they do anything: a model, with its progress shown, and a machine's profile."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache.errors import ProfileError
from offload.costs.machine import MachineProfile
from offload.costs.stock import find_machine
from offload.options import LoadOptions
from offload.system.messages import notice, warning
from offload.system.paths import machine_profile_path
from offload.terminal.console import waiting


def load_model(model: str | Path, options: LoadOptions) -> Any:
    """An OffloadedModel, with progress on a terminal. Raises OffloadError."""
    with waiting("starting"):
        from offload.model import OffloadedModel

    return OffloadedModel.open(model, options, progress=sys.stderr.isatty())


def with_machine(machine: Path | None, options: LoadOptions) -> tuple[Path | None, LoadOptions]:
    """The file of a machine's profile, and the options. `--profile` named that file before, and still may."""
    if options.profile is None or Path(options.profile).suffix != ".json":
        return machine, options
    notice("--profile names a recorded trace now: a machine's profile is --machine")
    return machine or Path(options.profile), replace(options, profile=None)


def find_profile(path: Path | None) -> MachineProfile | None:
    """The machine profile in `path`, a stock machine of that name, or what `offload profile` stored; None if it has
    not, or what it stored cannot be read any more, which is said. A profile of a busy machine is warned of. Raises
    ProfileError for a `path` that is no profile, and OSError."""
    if path is not None:
        return checked(find_machine(path))
    if not machine_profile_path().exists():
        return None
    try:
        return checked(MachineProfile.read(machine_profile_path()))
    except ProfileError as error:
        notice(error)
        return None


def measured_machine(path: Path | None, *, required: bool) -> MachineProfile | None:
    """The profile in `path`, a stock machine of that name, or what `offload profile` stored. Raises ProfileError where
    it is `required` and there is none; otherwise that is None."""
    stored = machine_profile_path()
    if path is None and not stored.exists():
        if required:
            raise ProfileError("this machine has not been measured: run `offload profile`, or give --machine")
        return None
    return checked(MachineProfile.read(stored) if path is None else find_machine(path))


def checked(profile: MachineProfile) -> MachineProfile:
    """The profile, with a warning where the machine was busy when it was measured, or nobody measured it."""
    if profile.estimated is not None:
        notice(f"this machine is estimated, {profile.estimated}")
    if profile.busy is not None:
        warning(
            f"this machine's profile was measured while it was busy ({profile.busy}): predictions may be far off: "
            "measure again when it is idle, with: offload profile"
        )
    return profile
