"""What is best for a model, this machine and these budgets: recorded, replayed, and the best of it measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cache.errors import BudgetError, OffloadError, PolicyError, TraceError
from cache.traces.trace import Trace
from cache.types import Tier
from offload.costs.machine import MachineProfile
from offload.decide.preset import DEFAULT, Preset
from offload.decide.presets import PRESETS, in_each, several_precisions, stated_parts
from offload.options import LoadOptions, SamplingOptions
from offload.plan.budgets import Plan
from offload.plan.tuned import Place, Tuned
from offload.simulation.forecast import check_profile
from offload.simulation.mix import as_run
from offload.tuning.trials import Length, Say, Trial, measured, on_device, reference_plan, replayed_as_planned, speed_of

POLICIES = ("lfru", "lru", "decay", "hobbit", "recall")
PREDICTORS = ("auto", "none", "ensemble")
SCHEDULERS = ("gpu-only", "hybrimoe", "dali", "auto")
VERIFIED = 3
"""How many of the best are measured."""
REFUSALS = (PolicyError, TraceError, BudgetError)
"""What one composition may raise where another one runs: gates that cannot be asked, precisions that do not fit."""
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
    "Translate into French: The library closes at eight in the evening.",
    "Tell a short story about a lighthouse keeper and a lost ship.",
    "List the main differences between a virus and a bacterium.",
)
"""What is recorded: different things, so that no topic's experts are all there is."""


def tune(
    model: str | Path,
    options: LoadOptions,
    *,
    lossy: bool,
    machine: MachineProfile,
    length: Length,
    trace: Trace | None,
    say: Say,
    notice: Callable[[str], object],
) -> tuple[Tuned, list[Trial]]:
    """The best composition, and all that were tried, the measured ones first; nothing is stored yet.

    Replays every preset that needs no profile and no calibration, single policies, and the best policy with predictors
    and schedulers; only lossless ones unless `lossy`. The best three and what runs without a preset are measured, and
    the fastest wins. Parts that `options` name are the same in all. What this model or these budgets refuse is left
    out, and `notice` is told. With a `trace` that one is replayed and followed; else one is recorded, beside what will
    be stored. Raises OffloadError, and KeyboardInterrupt if stopped.
    """
    place = Place.of(model, options)
    plan = reference_plan(model, options)
    check_profile(machine, plan)
    first = distinct([*systems(lossy), *(alone("policy", name) for name in POLICIES)], plan, options)
    if trace is None:
        file = place.path.with_suffix(".safetensors")
        record(model, options, file, length.tokens, say)
        seen = Trace.open(file)
    else:
        seen = followed(plan, trace, length)
    judge = _Judge(model, options, plan, machine, seen, trace, length, say, notice)
    trials = judge.replayed(first, "systems and policies")
    if not trials:
        raise judge.refused[-1]
    simple = [trial for trial in trials if trial.preset.name == DEFAULT.name or trial.preset.name not in PRESETS]
    best = max(simple or trials, key=predicted)
    second = distinct(combinations(best.preset, plan), plan, options, known=first)
    trials += judge.replayed(second, "combinations")
    trials.sort(key=predicted, reverse=True)
    chosen = judge.measured(trials)
    if not chosen:
        raise judge.refused[-1]
    names = {trial.preset.name for trial in chosen}
    found = [*chosen, *(trial for trial in trials if trial.preset.name not in names)]
    return Tuned(place, chosen[0].preset, [trial.as_dict() for trial in found]), found


@dataclass
class _Judge:
    """Replays and measures compositions. What this model or these budgets refuse is left out, and `notice` is told."""

    model: str | Path
    options: LoadOptions
    plan: Plan
    machine: MachineProfile
    seen: Trace
    """What is replayed."""
    trace: Trace | None
    """What a measurement follows, if it follows one."""
    length: Length
    say: Say
    notice: Callable[[str], object]

    refused: list[OffloadError] = field(default_factory=list)

    def replayed(self, candidates: Sequence[Preset], what: str) -> list[Trial]:
        """What replay predicts of the `candidates`."""
        found = []
        for number, preset in enumerate(candidates, 1):
            self.say(f"replaying {what}, {number} of {len(candidates)}: {preset.name}")
            with self._leaving_out(preset):
                predicted = replayed_as_planned(self.seen, preset, self.plan, self.machine, self.options)
                found.append(Trial(preset, predicted))
        return found

    def measured(self, trials: Sequence[Trial]) -> list[Trial]:
        """The first of `trials` and the default, measured, the fastest first."""
        found: list[Trial] = []
        for rank, trial in enumerate(trials):
            if (len(found) < VERIFIED and rank < 2 * VERIFIED) or trial.preset.name == DEFAULT.name:
                self.say(f"measuring {trial.preset.name}")
                with self._leaving_out(trial.preset):
                    speeds = measured(self.model, self.options, trial.preset, self.length, self.trace)
                    found.append(replace(trial, actual=speeds))
        return sorted(found, key=lambda trial: speed_of(trial) or 0.0, reverse=True)

    @contextmanager
    def _leaving_out(self, preset: Preset) -> Iterator[None]:
        try:
            yield
        except REFUSALS as error:
            self.refused.append(error)
            self.notice(f"{preset.name} is left out: {error}")


def systems(lossy: bool) -> list[Preset]:
    """What runs without a preset, and every published system that can run as it is."""
    ready = [preset for preset in PRESETS.values() if not preset.learns and not preset.needs_calibration]
    return [DEFAULT, *(preset for preset in ready if lossy or preset.lossless)]


def alone(part: str, name: str) -> Preset:
    """One part, beside what runs without a preset."""
    given: dict[str, Any] = {part: name}
    return replace(DEFAULT, name=f"{part} {name}", source="offload tune", **given)


def combinations(best: Preset, plan: Plan) -> list[Preset]:
    """The policy of `best` with every predictor and scheduler."""
    schedulers = SCHEDULERS if plan.computing_tier is Tier.GPU else SCHEDULERS[:1]
    return [
        replace(
            best,
            name=" + ".join([best.policy, *(p for p in (predictor, scheduler) if p not in ("auto", "gpu-only"))]),
            predictor=predictor,
            scheduler=scheduler,
            source="offload tune",
            differs="",
        )
        for predictor in PREDICTORS
        for scheduler in schedulers
    ]


def distinct(presets: Sequence[Preset], plan: Plan, options: LoadOptions, known: Sequence[Preset] = ()) -> list[Preset]:
    """`presets` with the user's own parts in place of theirs, each composition once, and none that is `known`."""
    given = stated_parts(options)
    seen = [preset.parts for preset in known]
    found = []
    for preset in presets:
        own = on_device(in_each(preset, **given), plan, options)
        if own.parts not in seen:
            seen.append(own.parts)
            found.append(own)
    return found


def predicted(trial: Trial) -> float:
    """Tokens/s of decoding, by replay."""
    return 0.0 if trial.predicted is None else trial.predicted.tokens_per_s


def followed(plan: Plan, trace: Trace, length: Length) -> Trace:
    """What a measurement that follows `trace` will route. Raises OffloadError."""
    if plan.work is None:
        raise OffloadError("it is not known how many experts a token of this model goes to: leave --trace out")
    sizes = {"prompt_tokens": length.prompt_tokens, "tokens": length.tokens, "generations": length.repeat}
    return as_run(plan, plan.work, trace, **sizes)


def record(model: str | Path, options: LoadOptions, file: Path, tokens: int, say: Say) -> None:
    """Record the routing of a few built-in prompts, so many tokens each, with all that the family shows of its routers.

    Random tokens stand in for prompts where the model has no tokenizer. Raises OffloadError; KeyboardInterrupt.
    """
    import torch

    from offload.model import OffloadedModel
    from offload.talk.prompts import answer, prompt_ids
    from offload.talk.reply import Interrupt

    say("loading the model")
    experts = None if several_precisions(options.experts or "") else options.experts
    own = replace(options, preset=None, fallback=None, scheduler=None, experts=experts)
    file.parent.mkdir(parents=True, exist_ok=True)
    with OffloadedModel.open(model, own) as loaded, ExitStack() as stack:
        depth = min(3, loaded.plan.layers - 1)
        for scores, ahead in ((True, depth), (False, depth), (True, 0), (False, 0)):
            try:
                stack.enter_context(
                    loaded.record_trace(file, scores=scores, predicted=ahead, workload="offload tune", overwrite=True)
                )
                break
            except TraceError:  # this family does not show its scores, or its gates cannot be asked
                if not scores and not ahead:
                    raise
        interrupt = stack.enter_context(Interrupt())
        vocabulary = loaded.config.get_text_config().vocab_size
        for number, text in enumerate(PROMPTS, 1):
            say(f"recording prompt {number} of {len(PROMPTS)}")
            if loaded.tokenizer is None:
                generator = torch.Generator().manual_seed(number)
                ids = torch.randint(vocabulary, (16,), generator=generator).tolist()
            else:
                ids = prompt_ids(loaded, str(model), text)
            answer(loaded, ids, SamplingOptions(max_new_tokens=tokens, temperature=0), interrupt)
