"""Many presets on many traces: `offload replay --preset`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.errors import OffloadError
from cache.traces.trace import Trace
from offload.simulation.rows import Setting
from offload.simulation.systems import PresetRow, chosen_presets, ranked, replay_preset
from predictors.base import build_predictor

Progress = Callable[[int, str], object]
"""Told how many replays are done, and which one begins."""


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
    presets = chosen_presets(names, said, setting.profile is not None, notice)
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


def _several(text: str) -> bool:
    return "," in text.split("(")[0]
