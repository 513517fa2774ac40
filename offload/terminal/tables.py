"""Predictions for people: which profile they are made by, and predicted beside measured. Torch-free."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from cache.errors import ProfileError
from offload.costs.machine import MachineProfile
from offload.system.paths import machine_profile_path
from offload.system.sizes import format_bytes
from offload.terminal import console as terminal

if TYPE_CHECKING:
    from offload.simulation.forecast import Speeds


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
        terminal.notice(error)
        return None


def speeds_table(predicted: Speeds | None, actual: Speeds | None) -> Table:
    """A row a figure; how far a rate was off, as a share of what was measured."""
    table = Table("", box=None, header_style="dim")
    for column in (*(["predicted"] if predicted else []), *(["actual", "error"] if actual else [])):
        table.add_column(column, justify="right")
    some = predicted or actual
    for name in asdict(some) if some is not None else ():
        said, found = (None if speeds is None else getattr(speeds, name) for speeds in (predicted, actual))
        if said is None and found is None:
            continue
        error = f"{said / found - 1:+.0%}" if said and found and "hit_rate" not in name else ""
        cells = (*([_show(name, said)] if predicted else []), *([_show(name, found), error] if actual else []))
        table.add_row(_NAMES[name], *cells)
    return table


_NAMES = {
    "decode_tokens_per_s": "decode, tokens/s",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "time_to_first_token_s": "time to first token",
    "hit_rate": "hit rate, decode",
    "host_hit_rate": "hit rate in RAM behind it",
    "peak_rss_bytes": "peak RAM",
    "peak_gpu_bytes": "peak accelerator memory",
}


def _show(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return format_bytes(int(value))
    if "hit_rate" in name:
        return f"{value:.1%}"
    return f"{value:.2f} s" if name.endswith("_s") and "per_s" not in name else f"{value:.1f}"
