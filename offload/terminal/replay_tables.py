"""`offload replay --preset`: runs the replays, and prints what they say as one table for each trace and capacity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cache.errors import OffloadError
from cache.traces.trace import Trace
from offload.simulation.compare import Setting
from offload.simulation.systems import PresetRow, chosen_presets, ranked, replay_preset
from offload.system.sizes import format_bytes
from predictors.base import build_predictor

Progress = Callable[[int, str], object]


def replay_presets(
    traces: Sequence[str],
    names: Sequence[str],
    capacities: Sequence[str],
    setting: Setting,
    said: Mapping[str, Any],
    notice: Callable[[object], object],
) -> tuple[int, Callable[[Progress], list[PresetRow]]]:
    """How many replays there are, and what runs them.

    `said` are the parts that flags name, which win over every preset's. `notice` is told what is left out, and what a
    trace lacks. Raises OffloadError.
    """
    for name, value in said.items():
        if isinstance(value, str) and (value == "all" or _several(value)):
            raise OffloadError(f'--{name} "{value}": with --preset it takes one name, which all presets run with')
    flags = ["--profile"] if setting.profile is None else []
    presets = chosen_presets(names, said, lambda preset: flags if preset.profiles else [], notice)
    opened = [Trace.open(trace) for trace in traces]
    for trace in opened:
        named = [preset for preset in presets if preset.predictor != "auto"]
        blind = [preset.name for preset in named if build_predictor(preset.predictor, 1, 1).looks_ahead]
        if trace.predicted is None and blind:
            notice(f"{trace.name} has no record of what gates said ahead, which {', '.join(blind)} would go by")

    def run(advance: Progress) -> list[PresetRow]:
        rows = []
        tasks = [(trace, preset) for trace in opened for preset in presets]
        for done, (trace, preset) in enumerate(tasks):
            advance(done, f"{Path(trace.name).name}: {preset.name}")
            rows += replay_preset(trace, preset, capacities, setting)
        return ranked(rows)

    return len(opened) * len(presets), run


def preset_tables(rows: Sequence[PresetRow]) -> list[Table]:
    """One table for each trace and capacity, the fastest first."""
    found = []
    for trace, capacity in dict.fromkeys((row.trace, row.capacity) for row in rows):
        here = [row for row in rows if (row.trace, row.capacity) == (trace, capacity)]
        first = here[0]
        where = f"{capacity} ({format_bytes(first.capacity_bytes)}) on the {first.device}"
        if first.host_capacity:
            where += f", {first.host_capacity} in RAM"
        mode = "warm" if first.warm else "cold"
        table = Table(title=f"{Path(trace).name}: {where}, {mode}", title_justify="left")
        table.add_column("", justify="right")
        table.add_column("preset")
        for column in ("tokens/s", "hit rate", "late", "disk/token", "link/token", "stall", "lossless"):
            table.add_column(column, justify="right")
        table.add_column("experts ran at")
        for row in here:
            table.add_row(*_cells(row))
        found.append(table)
    return found


def _cells(row: PresetRow) -> list[str]:
    shares = {**row.precision_shares, "left out": row.skipped_share, "replaced": row.replaced_share}
    return [
        str(row.rank),
        row.preset,
        f"{row.tokens_per_s:,.2f}",
        f"{row.hit_rate:.1%}",
        f"{row.late_hit_rate:.1%}",
        format_bytes(row.bytes_from_disk_per_token),
        format_bytes(row.bytes_over_link_per_token) if row.device == "gpu" else "",
        f"{row.stall_share:.0%}",
        f"{row.lossless_share:.1%}",
        ", ".join(f"{share:.1%} {name}" for name, share in shares.items() if share),
    ]


def _several(text: str) -> bool:
    return "," in text.split("(")[0]
