"""`offload tune`: finds what is best for a model here, and keeps it for `--preset auto`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import OffloadError, ProfileError
from cache.outputs import check_output
from offload.costs.machine import MachineProfile
from offload.options import LoadOptions
from offload.system.messages import notice
from offload.system.paths import cache_dir, machine_profile_path, own_place
from offload.terminal import console
from offload.terminal.exits import INTERRUPTED
from offload.terminal.flags import MOST_REPEATS, Json, Model
from offload.terminal.loading import checked, find_profile, with_machine
from offload.terminal.tables import trials_table

if TYPE_CHECKING:
    from offload.plan.budgets import Plan


FollowedTrace = Annotated[
    Path | None,
    typer.Option(
        metavar="TRACE",
        help="Replay this recorded trace, and follow it in measurements: for checkpoints of random weights.",
    ),
]
MeasuredMachine = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What `offload profile` measured. Default: what it stored last, or what is measured now.",
    ),
]


def tune(
    model: Model,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Also try fallbacks and lower precisions, which change what the model says.")
    ] = False,
    tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of each recorded and measured reply.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each measured prompt.")] = 32,
    repeat: Annotated[
        int, typer.Option(metavar="R", min=1, max=MOST_REPEATS, help="Replies to measure, after one that warms up.")
    ] = 3,
    trace: FollowedTrace = None,
    machine: MeasuredMachine = None,
    preset: Annotated[str | None, typer.Option(hidden=True)] = None,
    json_output: Json = False,
    *,
    options: LoadOptions,
) -> None:
    """Find the policy, predictor and scheduler that are best for a model on this machine within these budgets.

    Records a short trace of built-in prompts, and replays every lossless preset and many combinations on it. Then
    it measures the best three and the default, and stores the fastest: `--preset auto` with the same budgets runs
    it. Parts that a flag names stay as they are. Ctrl-C stores nothing.
    """
    if preset is not None:
        raise OffloadError("--preset: tune chooses among all of them: leave it out")
    machine, options = with_machine(machine, options)
    with console.waiting("starting"):
        from cache.traces.trace import Trace
        from offload.plan.tuned import Place
        from offload.tuning.trials import Length, reference_plan
        from offload.tuning.tune import tune as find_best

        routed = None if trace is None else Trace.open(trace)
        check_output(own_place(Place.of(model, options).path))
    with console.steps() as say:
        try:
            measured = _machine(machine, reference_plan(model, options), options, say)
            length = Length(tokens=tokens, prompt_tokens=prompt_tokens, repeat=repeat)
            best, trials = find_best(
                model,
                options,
                lossy=lossy,
                machine=measured,
                length=length,
                trace=routed,
                say=say,
                notice=notice,
            )
        except KeyboardInterrupt:
            notice("stopped: nothing was stored")
            raise typer.Exit(INTERRUPTED) from None
    file = best.write()
    if json_output:
        console.print_json({"winner": best.winner.parts, "stored": str(file), "rows": list(best.rows)})
    else:
        console.answers().print(trials_table(f"{model} on {best.place.device}", trials))
    notice(f"{best.winner.name} is stored: --preset auto with the same budgets runs it")


def _machine(path: Path | None, plan: Plan, options: LoadOptions, say: Any) -> MachineProfile:
    """What was measured of this machine; where nothing is stored that fits the device, it is measured now and stored.

    Raises ProfileError.
    """
    from offload.device.choose import make_device
    from offload.machine.measure import measure_machine
    from offload.simulation.forecast import check_profile

    found = find_profile(path)
    if found is not None:
        if path is not None:
            return found
        with suppress(ProfileError):
            check_profile(found, plan)
            return found
    device = make_device(options.device, options.link)
    try:
        measured = measure_machine(
            cache_dir(), device, options.threads, on_step=lambda step: say(f"measuring this machine: {step}")
        )
    finally:
        device.close()
    measured.write(own_place(machine_profile_path()))
    notice(f"this machine was measured with {plan.device}: stored in {machine_profile_path()}")
    return checked(measured)
