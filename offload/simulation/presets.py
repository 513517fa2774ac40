"""Many presets on many traces: `offload replay --preset`, and the one system that flags of parts compose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import OffloadError, PolicyError
from cache.quota import make_quota
from cache.traces.trace import Trace
from offload.decide.placements.base import find_placement
from offload.decide.preset import Preset
from offload.decide.rules import nothing_to_divide
from offload.decide.schedulers.base import divides
from offload.simulation.preset_rows import PresetRow
from offload.simulation.rows import Setting, check_quota
from offload.simulation.systems import chosen_presets, replay_preset


@dataclass(frozen=True)
class PresetTask:
    """One preset on one trace, at every capacity. A task of a sweep, as `offload.simulation.sweep.Task` is."""

    trace: str
    preset: Preset
    capacities: tuple[str, ...]
    setting: Setting

    row = PresetRow

    @property
    def title(self) -> str:
        """What a progress bar says."""
        return f"{Path(self.trace).name}: {self.preset.name}, {', '.join(self.capacities)}"

    @property
    def facts(self) -> Any:
        """What tells it from other tasks with this trace and this setting."""
        return [self.preset.name, self.preset.parts]

    def run(self) -> list[PresetRow]:
        """The rows, in a process of its own or not; not ranked yet. Raises OffloadError."""
        return replay_preset(Trace.open(self.trace), self.preset, self.capacities, self.setting)


def preset_tasks(
    traces: Sequence[str],
    names: Sequence[str],
    capacities: Sequence[str],
    setting: Setting,
    said: Mapping[str, Any],
    notice: Callable[[str], object],
) -> list[PresetTask]:
    """A task for each trace, preset and capacity.

    `said` are the parts that flags name, which win over every preset's. `notice` is told what is left out. Raises
    OffloadError, also for a part that would do nothing here.
    """
    for name, value in said.items():
        if name != "experts" and isinstance(value, str) and (value == "all" or _several(value)):
            raise OffloadError(
                f'--{name} "{value}": beside presets, or parts of a system, it takes one name, which all run with'
            )
    presets = chosen_presets(names, said, setting.profile is not None, notice)
    _check_parts(said, presets, setting)
    return [
        PresetTask(trace, preset, (capacity,), setting)
        for trace in traces
        for preset in presets
        for capacity in dict.fromkeys(capacities)
    ]


def _check_parts(said: Mapping[str, Any], presets: Sequence[Preset], setting: Setting) -> None:
    """Raises PolicyError for a part that is `said` and would do nothing in this setting."""
    scheduler, placement, quota = (said.get(name) for name in ("scheduler", "placement", "quota"))
    if scheduler is not None and divides(scheduler) and setting.device == "cpu":
        raise nothing_to_divide(scheduler, "gpu")
    if placement is not None and setting.profile is None and find_placement(placement).needs_counts:
        raise PolicyError(
            f"--placement {placement} does nothing without a --profile: a trace does not say what its model used before"
        )
    if quota is not None and setting.profile is None:
        check_quota(make_quota(quota, 1, 1), setting)


def _several(text: str) -> bool:
    return "," in text.split("(")[0]
