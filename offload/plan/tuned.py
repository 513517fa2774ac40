"""What `offload tune` found best for a model on this machine, and where that is kept. Torch-free until asked."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cache.errors import ProfileError
from cache.outputs import output
from offload.decide.preset import PARTS, Preset
from offload.options import PlanOptions
from offload.system.paths import cache_dir, own_place
from offload.system.sizes import parse_bytes

FORMAT = "offload-tuned"
VERSION = 1


@dataclass(frozen=True)
class Place:
    """What a winner is stored for: a hub id or a folder, a device, and budgets in bytes, None for one not stated."""

    model: str
    device: str
    gpu_mem: int | None
    cpu_mem: int | None
    expert_cache: int | None

    @classmethod
    def of(cls, model: str | Path, options: PlanOptions) -> Place:
        """Raises BudgetError for what is no size, DeviceError for what is no device."""
        from offload.device.choose import device_kind

        sizes = {"--gpu-mem": options.gpu_mem, "--cpu-mem": options.cpu_mem, "--expert-cache": options.expert_cache}
        parsed = [None if size is None else parse_bytes(size, flag) for flag, size in sizes.items()]
        folder = Path(model)
        return cls(str(folder.resolve()) if folder.is_dir() else str(model), device_kind(options.device), *parsed)

    @property
    def path(self) -> Path:
        """Where it is stored; it may not exist yet."""
        digest = hashlib.blake2b(json.dumps(asdict(self)).encode(), digest_size=12).hexdigest()
        return cache_dir() / "tuned" / f"{digest}.json"


@dataclass(frozen=True)
class Tuned:
    """The winner, and the table that it won: what replay predicted and what was measured."""

    place: Place
    winner: Preset
    rows: Sequence[dict[str, Any]] = field(default=())

    def write(self) -> Path:
        """Store it, whole or not at all, in place of what was there; gives the file. Raises OutputError and
        DiskSpaceError."""
        path = own_place(self.place.path)
        said = {"format": FORMAT, "version": VERSION, "place": asdict(self.place), "winner": asdict(self.winner)}
        text = json.dumps({**said, "rows": list(self.rows)}, indent=1)
        with output(path) as file:
            file.write(text.encode() + b"\n")
        return path

    @classmethod
    def read(cls, place: Place) -> Tuned | None:
        """What is stored for `place`; None if nothing is. Raises ProfileError for a file that is none of ours."""
        path = place.path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise ValueError(f"version {values['version']}")
            known = {name: values["winner"][name] for name in ("name", *PARTS, "source", "differs")}
            return cls(place, Preset(**known), values["rows"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProfileError(f"{path} cannot be read ({error}): run `offload tune` again") from error


def find_tuned(model: str | Path, options: PlanOptions) -> Preset | None:
    """What `--preset auto` runs: the stored winner; None, with a warning that says what to do, where there is none.

    Raises ProfileError and BudgetError.
    """
    found = Tuned.read(Place.of(model, options))
    if found is None:
        warnings.warn(
            "--preset auto: nothing was tuned for this model, device and these budgets, so defaults run: "
            f"`offload tune {model}`, with the same budgets, finds what is best",
            stacklevel=5,  # find_tuned, compose, what plans or assembles, what a user calls
        )
        return None
    return found.winner
