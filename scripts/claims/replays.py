"""Replays as claims ask for them: hits of a policy, and a preset under the simulated clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.traces.trace import Trace
from offload.decide.preset import Preset
from offload.decide.presets import find_preset, in_each
from offload.simulation.compare import replay_one
from offload.simulation.preset_rows import PresetRow
from offload.simulation.rows import Setting
from offload.simulation.systems import replay_preset
from scripts.claims.workloads import EXPERT_BYTES, Workload


def hits(
    trace: Trace, policy: str, capacity: str, *, pool: str = "layer", warm: bool = True, profile: Path | None = None
) -> float:
    """The hit rate of a policy on demand."""
    setting = Setting(pool=pool, warm=warm, profile=None if profile is None else str(profile))
    return replay_one(trace, policy, [capacity], setting)[0].hit_rate


def misses(trace: Trace, policy: str, capacity: str, **setting: Any) -> float:
    """One minus it."""
    return 1 - hits(trace, policy, capacity, **setting)


def run(
    work: Workload,
    preset: str | Preset,
    capacity: str = "25%",
    *,
    trace: Trace | None = None,
    profile: Path | None = None,
    host: str = "100%",
    warm: bool = True,
    **parts: Any,
) -> PresetRow:
    """A preset, with other `parts` if there are any, on the accelerator of the workload's machine.

    By default on the held-out sequences, with the others as the profile.
    """
    setting = Setting(
        timed=True,
        machine=work.machine,
        expert_bytes=EXPERT_BYTES,
        device="gpu",
        host_capacity=host,
        warm=warm,
        profile=str(work.learnt if profile is None else profile),
    )
    chosen = in_each(find_preset(preset) if isinstance(preset, str) else preset, **parts)
    return replay_preset(work.held_out if trace is None else trace, chosen, [capacity], setting)[0]
