"""What a replay of a preset is summed up in: one row, and the ranks of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cache.traces.trace import Trace
from cache.types import Phase, Tier
from offload.decide.manager import Manager
from offload.decide.preset import Preset
from offload.decide.slices import Slices
from offload.simulation.clock import Timeline
from offload.simulation.rows import Setting


@dataclass(frozen=True)
class PresetRow:
    """One preset on one trace at one capacity. Shares are of all uses of experts, bytes of all that was moved."""

    trace: str
    preset: str
    policy: str
    pool: str
    quota: str | None
    predictor: str
    prefetcher: str
    prefetch_depth: int | None
    experts: str
    fallback: str
    scheduler: str
    placement: str
    device: str
    warm: bool
    profile: str | None
    """The trace that parts which learn were trained on."""
    capacity: str
    """Of the tier that computes, as it was asked for: a share of all experts at the model's own precision, or bytes."""
    capacity_bytes: int
    capacity_fraction: float
    """Of all experts at the model's own precision."""
    host_capacity: str
    accesses: int
    hit_rate: float
    late_hit_rate: float
    bytes_from_disk_per_token: float
    bytes_over_link_per_token: float
    stall_s: float
    stall_share: float
    """Of the time of all passes."""
    tokens_per_s: float
    """Of decoding, as the clock says; of reading prompts where nothing was decoded."""
    lossless_share: float
    """Computed as the model has it: by its own experts, at its own precision."""
    precision_shares: dict[str, float]
    skipped_share: float
    replaced_share: float
    dropped_share: float
    """Of the experts that the trace has for tokens; the shares above are of the rest, times what the rest is of all."""
    warm_up: int = 0
    """Sequences that were replayed first, and are not counted."""
    rank: int = 0
    """By tokens/s among the presets at this capacity."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def preset_row(
    trace: Trace,
    preset: Preset,
    capacity: str,
    capacity_bytes: int,
    expert_bytes: int,
    setting: Setting,
    manager: Manager,
    timeline: Timeline,
    slices: Slices,
    own: str,
) -> PresetRow:
    """What a replay of `preset` came to, with `capacity_bytes` for experts where they are computed. `own` is the
    model's own precision."""
    stats = timeline.tiers[manager.computing.tier]
    accesses = max(stats.accesses, 1)
    tokens = max(sum(timeline.phases[phase].tokens for phase in Phase), 1)
    seconds = sum(timeline.phases[phase].seconds for phase in Phase)
    serving = manager.serving
    each = (1 - serving.dropped_share) / accesses
    by_precision = dict.fromkeys(slices.names, 0.0)  # "auto,nf4" of a model that is nf4 already has one name twice
    for name, count in zip(slices.names, serving.uses, strict=True):
        by_precision[name] += count * each
    return PresetRow(
        trace=trace.name,
        preset=preset.name,
        **preset.parts,
        device=setting.device,
        warm=setting.warm,
        warm_up=setting.warm_up,
        profile=setting.profile,
        capacity=capacity,
        capacity_bytes=capacity_bytes,
        capacity_fraction=capacity_bytes / (expert_bytes * trace.num_layers * trace.num_experts),
        host_capacity=setting.host_capacity if setting.device == "gpu" else "",
        accesses=stats.accesses,
        hit_rate=stats.hits / accesses,
        late_hit_rate=stats.late_hits / accesses,
        bytes_from_disk_per_token=timeline.bytes_from_disk / tokens,
        bytes_over_link_per_token=stats.bytes_in / tokens if manager.computing.tier is Tier.GPU else 0.0,
        stall_s=timeline.stall_s,
        stall_share=timeline.stall_s / seconds if seconds else 0.0,
        tokens_per_s=timeline.tokens_per_s,
        lossless_share=by_precision.get(own, 0.0),
        precision_shares=by_precision,
        skipped_share=serving.skipped * each,
        replaced_share=serving.replaced * each,
        dropped_share=serving.dropped_share,
    )


def ranked(rows: Sequence[PresetRow]) -> list[PresetRow]:
    """`rows` with their ranks, the fastest first, trace by trace and capacity by capacity in the order given."""
    places = dict.fromkeys((row.trace, row.capacity) for row in rows)
    found = []
    for place in places:
        here = sorted((row for row in rows if (row.trace, row.capacity) == place), key=lambda row: -row.tokens_per_s)
        found += [replace(row, rank=rank) for rank, row in enumerate(here, 1)]
    return found
