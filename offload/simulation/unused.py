"""What is asked of a replay and has no effect there: a line each, for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cache.quota import make_quota
from cache.traces.trace import Trace
from offload.decide.fallbacks.base import find_fallback
from offload.decide.placements.base import find_placement
from offload.decide.prefetchers.base import make_rule
from offload.decide.preset import Preset
from offload.decide.rules import Rules, depth_of, too_deep
from offload.simulation.rows import Setting, adapts_in_vain
from predictors.base import Predictor, build_predictor


def unused(
    traces: Sequence[Trace], systems: Sequence[Preset], setting: Setting, said: Mapping[str, Any]
) -> Iterator[str]:
    """What to say of `systems` replayed on `traces`, where flags have `said` some of their parts.

    Raises PolicyError for a part that cannot be made.
    """
    if setting.profile is not None and not any(_learns(system) for system in systems):
        yield (
            f"--profile {setting.profile} does nothing: of the parts that are replayed, none learns from a trace, and "
            "what knows the future goes by the trace that is replayed"
        )
    yield from _unused_parts(systems, setting, said)
    for layers in dict.fromkeys(trace.num_layers for trace in traces):
        if line := too_deep(said.get("prefetch_depth"), layers):
            yield line
    for trace in traces:
        if setting.warm and trace.num_sequences == 1:
            yield f"{trace.name} has one sequence: --warm is as --cold"
        yield from _blind(trace, systems, said)


def _learns(system: Preset) -> bool:
    """Whether a profile makes a difference."""
    return bool(Rules.of(system, None).learners) or find_fallback(system.fallback).needs_calibration


def _unused_parts(systems: Sequence[Preset], setting: Setting, said: Mapping[str, Any]) -> Iterator[str]:
    """Of the parts that systems bring along, those that do nothing in this setting."""
    if setting.device == "cpu" and (names := [each.name for each in systems if each.divides]):
        who = _listed(names, "runs", "run")
        yield f"{who} without a scheduler: the CPU computes everything here, and no layer is divided: add --device gpu"
    if setting.profile is not None:
        return
    if names := [each.name for each in systems if find_placement(each.placement).needs_counts]:
        who = _listed(names, "begins", "begin")
        yield f"{who} with empty caches: nothing is known of what was used before: add --profile"
    if said.get("quota") is None and (names := [each.name for each in systems if _stays_even(each, setting)]):
        who = _listed(names, "runs", "run")
        yield f"{who} with even shares: every sequence of a cold replay begins anew: add --warm or --profile"


def _stays_even(system: Preset, setting: Setting) -> bool:
    return system.quota is not None and adapts_in_vain(make_quota(system.quota, 1, 1), setting)


def _blind(trace: Trace, systems: Sequence[Preset], said: Mapping[str, Any]) -> Iterator[str]:
    """Of what goes by the gates' word on the next layers, what `trace` does not have."""
    depths: dict[str, int] = {}  # of those that do, by name
    for each in systems:
        if each.predictor != "auto" and _predictor(each.predictor, trace).looks_ahead:
            depth = depth_of(make_rule(each.prefetcher), each.prefetch_depth, trace.num_layers)
            depths[each.predictor] = max(depth, depths.get(each.predictor, 0))
    if trace.predicted is None and depths:
        yield f"{trace.name} has no record of what gates said ahead, which {_listed(depths, 'goes', 'go')} by"
    if trace.predicted is not None:
        far = trace.predicted.shape[2]
        if short := [name for name, depth in depths.items() if depth > far]:
            who = _listed(short, "goes", "go")
            yield f"{trace.name} has what gates said {far} layers ahead, and no further, which {who} by"
    yield from _nothing_ahead(trace, systems, said)


def _nothing_ahead(trace: Trace, systems: Sequence[Preset], said: Mapping[str, Any]) -> Iterator[str]:
    """Of what flags say of fetching ahead, what has no effect as the predictor "auto" fetches nothing ahead."""
    lossy = all(find_fallback(each.fallback).lossy for each in systems)
    if any(each.predictor != "auto" for each in systems) or not (lossy or trace.predicted is None):
        return
    why = "a lossy fallback" if lossy else f"{trace.name}, which has no record of what gates said ahead"
    for name in ("prefetcher", "prefetch_depth"):
        if said.get(name) is not None:
            flag = f"--{name.replace('_', '-')}"
            yield f"{flag} {said[name]} does nothing: with {why}, nothing is fetched ahead: name a --predictor"


def _predictor(spec: str, trace: Trace) -> Predictor:
    return build_predictor(spec, trace.num_layers, trace.num_experts)


def _listed(names: Iterable[str], one: str, many: str) -> str:
    found = list(names)
    return f"{', '.join(found)} {one if len(found) == 1 else many}"
