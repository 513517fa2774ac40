"""`offload bench`: how fast a model runs here, beside what was predicted for it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cache.errors import OffloadError
from offload.options import LoadOptions
from offload.system.messages import notice
from offload.terminal import console, loading
from offload.terminal.flags import MOST_REPEATS, Json, Machine, Model, PromptTokens, RouteTrace
from offload.terminal.tables import bound_line, speeds_table, trials_table

if TYPE_CHECKING:
    from cache.traces.trace import Trace
    from offload.costs.machine import MachineProfile
    from offload.tuning.trials import Length


def bench(
    model: Model,
    tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens to generate.")] = 64,
    prompt_tokens: PromptTokens = 64,
    repeat: Annotated[
        int, typer.Option(metavar="R", min=1, max=MOST_REPEATS, help="Replies to measure, after one that warms up.")
    ] = 3,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Sequences to generate at once.", hidden=True)] = 1,
    trace: RouteTrace = None,
    machine: Machine = None,
    json_output: Json = False,
    *,
    options: LoadOptions,
) -> None:
    """Measure how fast a model runs within a budget, beside what was predicted.

    Prints medians of several replies to random prompts, after one reply that warms the caches up. With several
    names in --preset, or all, it prints a table of them. --trace adds what a replay predicts, and how well that
    ranks them. --batch B generates in B sequences at once, of which nothing is predicted; where all experts
    are in RAM, MoE-Lens' bound of such batches is beside what was measured.
    """
    machine, options = loading.with_machine(machine, options)
    with console.waiting("starting"):
        from cache.traces.trace import Trace
        from offload.tuning.bench import bench as measure

        measured = loading.find_profile(machine)
        routed = None if trace is None else Trace.open(trace)
    if options.preset is not None and (options.preset == "all" or "," in options.preset):
        from offload.tuning.trials import Length

        if batch > 1:
            raise OffloadError(f"--batch {batch}: presets are compared with one sequence at a time: leave it out")
        if machine is not None and routed is None:
            notice("--machine does nothing for several presets without a --trace, by which they are predicted")
        if routed is not None and measured is None:
            notice("no prediction of speeds: this machine has not been measured: measure it with: offload profile")
        _compare(model, options, Length(tokens, prompt_tokens, repeat), routed, measured, json_output)
        return
    result = measure(
        model,
        options,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        repeat=repeat,
        batch=batch,
        trace=routed,
        profile=measured,
        progress=sys.stderr.isatty(),
    )
    if result.unpredicted is not None:
        notice(f"no prediction of speeds: {result.unpredicted}")
    if json_output:
        console.print_json(result.as_dict())
    else:
        console.answers().print(speeds_table(result.predicted, result.actual))
        if result.bound is not None:
            console.answers().print(bound_line(result.bound, result.batch_tokens_per_s))


def _compare(
    model: str, options: LoadOptions, length: Length, trace: Trace | None, machine: MachineProfile | None, as_json: bool
) -> None:
    """Several presets: prints the table, and how well replay ranks, or both as JSON."""
    names = [name.strip() for name in (options.preset or "").split(",")]
    from offload.tuning.trials import bench_presets, rank_correlation

    with console.steps() as say:
        trials = bench_presets(model, options, names, length, trace=trace, machine=machine, say=say, notice=notice)
    correlation = rank_correlation(trials)
    if as_json:
        rows = [trial.as_dict() for trial in trials]
        console.print_json({"model": model, "rows": rows, "rank_correlation": correlation})
        return
    console.answers().print(trials_table(model, trials))
    if correlation is not None:
        console.answers().print(f"Spearman's rank correlation of predicted and measured tokens/s: {correlation:.2f}")
