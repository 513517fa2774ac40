"""Compositions measured live, beside what a replay predicts of them: `offload bench --preset`, `offload tune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import OffloadError
from cache.traces.trace import Trace
from cache.types import Tier
from offload.costs.machine import MachineProfile
from offload.decide.preset import DEFAULT, Preset
from offload.decide.presets import several_precisions, stated_parts
from offload.decide.rules import nothing_to_divide
from offload.options import LoadOptions
from offload.plan.budgets import Plan
from offload.plan.prepare import make_plan
from offload.plan.work import computing_threads
from offload.simulation.forecast import check_profile
from offload.simulation.mix import as_run
from offload.simulation.preset_rows import PresetRow
from offload.simulation.rows import Setting
from offload.simulation.systems import chosen_presets, replay_preset
from offload.system.cores import at_most_cores
from offload.system.processes import processes
from offload.tuning.bench import bench

if TYPE_CHECKING:
    from offload.simulation.forecast import Speeds

Say = Callable[[str], object]


@dataclass(frozen=True)
class Length:
    """How much is generated for a measurement: as `offload bench` takes it."""

    tokens: int = 64
    prompt_tokens: int = 64
    repeat: int = 3


@dataclass(frozen=True)
class Trial:
    """One composition: what replay predicts, where it can, and what was measured, where it was."""

    preset: Preset
    predicted: PresetRow | None = None
    actual: Speeds | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "preset": self.preset.name,
            **self.preset.parts,
            "lossless": self.preset.lossless,
            "predicted": None if self.predicted is None else self.predicted.as_dict(),
            "actual": None if self.actual is None else asdict(self.actual),
        }


def planned(model: str | Path, options: LoadOptions, preset: Preset) -> Plan:
    """Where everything goes under `preset`. Raises OffloadError."""
    return make_plan(model, replace(options, preset=None, **preset.parts))


def reference_plan(model: str | Path, options: LoadOptions) -> Plan:
    """Where everything goes with one precision: the one `options` names, else the model's own. Raises OffloadError."""
    experts = options.experts or "auto"
    return planned(model, options, replace(DEFAULT, experts="auto" if several_precisions(experts) else experts))


def replayed_as_planned(
    trace: Trace, preset: Preset, plan: Plan, machine: MachineProfile, options: LoadOptions
) -> PresetRow:
    """What replay predicts of `preset` on `trace`, with as much memory for experts as `plan` has, the reference.

    Raises OffloadError, ProfileError for a machine that was not measured with the plan's device.
    """
    check_profile(machine, plan)
    work, tier = plan.work, plan.computing_tier
    setting = Setting(
        timed=True,
        warm=True,
        machine=machine,
        expert_bytes=plan.slot_bytes,
        dense_layer_bytes=0 if work is None else work.dense_layer_bytes,
        dense_pass_bytes=0 if work is None else work.dense_pass_bytes,
        device="gpu" if tier is Tier.GPU else "cpu",
        host_capacity=_capacity(plan.cache_bytes[Tier.CPU]),
        prefill=options.prefill,
        threads=at_most_cores(options.threads) or computing_threads(plan.device, plan.slot_bytes),
        profile=None if options.profile is None else str(options.profile),
    )
    (row,) = replay_preset(trace, preset, [_capacity(plan.cache_bytes[tier])], setting)
    return row


def measured(
    model: str | Path, options: LoadOptions, preset: Preset, length: Length, trace: Trace | None = None
) -> Speeds:
    """How fast `model` runs under `preset`, live: medians. With a `trace` its rows are followed.

    In a process of its own: what this one holds by now would be missing in the budget. Raises OffloadError.
    """
    given = replace(options, preset=None, **preset.parts)
    with processes(1) as pool:
        result = pool.submit(
            bench,
            model,
            given,
            tokens=length.tokens,
            prompt_tokens=length.prompt_tokens,
            repeat=length.repeat,
            trace=trace,
        )
        return result.result().actual


def bench_presets(
    model: str | Path,
    options: LoadOptions,
    names: Sequence[str],
    length: Length,
    *,
    trace: Trace | None,
    machine: MachineProfile | None,
    say: Say,
    notice: Callable[[str], object],
) -> list[Trial]:
    """Every preset of `names` ("all": every one) live, the fastest first; with a `trace` and a `machine`, predicted.

    Flags in `options` win over all of them. `notice` is told which were left out of "all", and why.
    Raises OffloadError.
    """
    presets = chosen_presets(names, stated_parts(options), options.profile is not None, notice)
    trials = []
    for number, preset in enumerate(presets, 1):
        say(f"{number} of {len(presets)}: {preset.name}")
        try:
            preset = on_device(preset, planned(model, options, preset), options)
            actual = measured(model, options, preset, length, trace)
        except OffloadError as error:
            if "all" not in names:
                raise
            notice(f"{preset.name} is left out: {error}")
            continue
        trials.append(Trial(preset, None, actual))
    if trace is not None and machine is not None and trials:
        plan = reference_plan(model, options)
        if plan.work is not None:
            lengths = {"prompt_tokens": length.prompt_tokens, "tokens": length.tokens}
            warm_up, routed = (as_run(plan, plan.work, trace, **lengths, generations=n) for n in (0, length.repeat))
            say("replaying")
            for i, trial in enumerate(trials):
                whole, first = (
                    replayed_as_planned(each, trial.preset, plan, machine, options) for each in (routed, warm_up)
                )
                trials[i] = replace(trial, predicted=_after_warm_up(whole, first, length.repeat))
    return sorted(trials, key=lambda trial: -(speed_of(trial) or 0.0))


def _after_warm_up(whole: PresetRow, first: PresetRow, generations: int) -> PresetRow:
    """What is predicted of so many generations, all equally long, after the `first` of the `whole`."""
    seconds = (generations + 1) / whole.tokens_per_s - 1 / first.tokens_per_s  # for as many tokens as one has
    return replace(
        whole,
        tokens_per_s=generations / seconds,
        hit_rate=((generations + 1) * whole.hit_rate - first.hit_rate) / generations,
    )


def on_device(preset: Preset, plan: Plan, options: LoadOptions) -> Preset:
    """`preset` without its scheduler where the CPU computes everything anyway. Raises PolicyError for one that
    `options` name."""
    if plan.computing_tier is Tier.GPU:
        return preset
    if options.scheduler not in (None, DEFAULT.scheduler):
        raise nothing_to_divide(options.scheduler)
    return replace(preset, scheduler=DEFAULT.scheduler)


def speed_of(trial: Trial) -> float | None:
    """Measured tokens/s of decoding."""
    return None if trial.actual is None else trial.actual.decode_tokens_per_s


def rank_correlation(trials: Sequence[Trial]) -> float | None:
    """Spearman's, of predicted and measured tokens/s; ties share their ranks. None below three trials with both."""
    pairs = [(t.predicted.tokens_per_s, speed_of(t)) for t in trials if t.predicted is not None and speed_of(t)]
    if len(pairs) < 3:
        return None
    predicted, found = (_ranks(np.array(values, np.float64)) for values in zip(*pairs, strict=True))
    if np.ptp(predicted) == 0 or np.ptp(found) == 0:
        return None
    return float(np.corrcoef(predicted, found)[0, 1])


def _capacity(nbytes: int) -> str:
    """As `offload replay` takes it, which has no size of nothing."""
    return str(nbytes) if nbytes else "0%"


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 1, the mean of their places for equal values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    found: NDArray[np.float64] = (ends - (counts - 1) / 2)[inverse]
    return found
