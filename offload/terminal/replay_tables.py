"""`offload replay` for people: one table for each trace and capacity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from offload.system.sizes import format_bytes

if TYPE_CHECKING:
    from offload.simulation.preset_rows import PresetRow
    from offload.simulation.rows import Row


def tables(rows: Sequence[Any]) -> list[Table]:
    """One table for each trace and capacity, of policies' rows or of presets'."""
    from offload.simulation.preset_rows import PresetRow

    return preset_tables(rows) if rows and isinstance(rows[0], PresetRow) else replay_tables(rows)


def replay_tables(rows: Sequence[Row]) -> list[Table]:
    """One table for each trace and capacity, the best hit rate first."""
    found = []
    ahead = any(row.prefetch_depth for row in rows)
    for trace, capacity in dict.fromkeys((row.trace, row.capacity) for row in rows):
        here = sorted(
            (r for r in rows if (r.trace, r.capacity) == (trace, capacity)), key=lambda row: _merit(row, ahead)
        )
        first = here[0]
        where = f"{first.capacity_slots} experts, {first.capacity_fraction:.1%}"
        if first.capacity_bytes is not None:
            where += f", {format_bytes(first.capacity_bytes)}"
        mode = f"{first.pool} pool, {_mode(first)}"
        table = Table(title=f"{Path(trace).name}: {capacity} ({where}), {mode}", title_justify="left")
        table.add_column("policy")
        for column in ("hit rate", "misses", "moved", "stall s", "tokens/s", "gap closed", "with bypass"):
            table.add_column(column, justify="right")
        table.add_column("kind")
        for row in here:
            table.add_row(*_cells(row))
        found.append(table)
    return found


def _mode(row: Row | PresetRow) -> str:
    if row.warm_up:
        return f"warm, after {row.warm_up} {'sequence' if row.warm_up == 1 else 'sequences'} of warm-up"
    return "warm" if row.warm else "cold"


def _merit(row: Row, ahead: bool) -> float:
    """What rows are sorted by: hits, or speed where some prefetch, since those are no hits."""
    return -(row.tokens_per_s or 0.0) if ahead else -row.hits


def _cells(row: Row) -> list[str]:
    params = ", ".join(f"{name}={value}" for name, value in row.params.items())
    kind = ["" if row.causal else "knows the future", "" if row.admission == "forced" else row.admission]
    if row.prefetch_depth:
        kind.append(f"{row.predictor}, {row.prefetch_depth} ahead: {row.useful_prefetches:,} of use")
    kind.append("" if row.profile is None else f"trained on {Path(row.profile).name}")
    return [
        f"{row.policy}({params})" if params else row.policy,
        f"{row.hit_rate:.4f}",
        f"{row.misses:,}",
        "" if row.bytes_moved is None else format_bytes(row.bytes_moved),
        "" if row.stall_s is None else f"{row.stall_s:,.1f}",
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.2f}",
        "" if row.gap_closed is None else f"{row.gap_closed:.1%}",
        "" if row.gap_closed_bypass is None else f"{row.gap_closed_bypass:.1%}",
        ", ".join(part for part in kind if part),
    ]


def preset_tables(rows: Sequence[PresetRow]) -> list[Table]:
    """One table for each trace and capacity, the fastest first."""
    found = []
    for trace, capacity in dict.fromkeys((row.trace, row.capacity) for row in rows):
        here = [row for row in rows if (row.trace, row.capacity) == (trace, capacity)]
        first = here[0]
        where = f"{capacity} ({format_bytes(first.capacity_bytes)}) on the {first.device}"
        if first.host_capacity:
            where += f", {first.host_capacity} in RAM"
        table = Table(title=f"{Path(trace).name}: {where}, {_mode(first)}", title_justify="left")
        table.add_column("", justify="right")
        table.add_column("preset")
        for column in ("tokens/s", "hit rate", "late", "disk/token", "link/token", "stall", "lossless"):
            table.add_column(column, justify="right")
        table.add_column("experts ran at")
        for row in here:
            table.add_row(*_preset_cells(row))
        found.append(table)
    return found


def _preset_cells(row: PresetRow) -> list[str]:
    shares = {**row.precision_shares, "left out": row.skipped_share, "replaced": row.replaced_share}
    shares["dropped"] = row.dropped_share
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
