"""`offload replay`: what other policies and capacities would have done with a recorded trace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import OffloadError
from offload.system.messages import notice
from offload.system.paths import machine_profile_path
from offload.system.progress import progress_bar
from offload.system.sizes import parse_bytes
from offload.terminal import console
from offload.terminal.flags import Json

if TYPE_CHECKING:
    from offload.simulation.compare import Row

_REPLAY = "What is replayed"
_COST = "What it costs"
_GRID = "Large grids"


def replay(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Recorded traces, .safetensors files.")],
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help='Eviction policies, with commas between them; "all" is every one there is. Parameters in brackets: '
            '"lfu(reset=True)"; one of your own is module:Class. Default: lru.',
            rich_help_panel=_REPLAY,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Compare published systems as a whole (docs/presets.md), with commas between them, or all; implies "
            "--timed. --policy, --pool, --predictor and --prefetch-depth replace these parts in all of them.",
            rich_help_panel=_REPLAY,
        ),
    ] = None,
    capacity: Annotated[
        str,
        typer.Option(
            metavar="SIZES",
            help="Sizes of the expert cache, with commas between them: shares of all experts or bytes, 10%,25%,4G.",
            rich_help_panel=_REPLAY,
        ),
    ] = "25%",
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="POOL",
            help="layer: a cache for each layer, the default; global: one for all of them.",
            rich_help_panel=_REPLAY,
        ),
    ] = None,
    quota: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the layers' caches divide the capacity: even, shallow, dp or distinct.",
            rich_help_panel=_REPLAY,
        ),
    ] = "even",
    warm: Annotated[
        bool,
        typer.Option(
            "--warm/--cold",
            help="Keep caches and counters from one sequence to the next, or empty them at every one.",
            rich_help_panel=_REPLAY,
        ),
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE",
            help="The trace that policies which learn, and quotas, are trained on.",
            rich_help_panel=_REPLAY,
        ),
    ] = None,
    machine: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What `offload profile` measured. Default: what it stored, if it did.",
            rich_help_panel=_COST,
        ),
    ] = None,
    expert_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Size of an expert. Default: what the trace says.", rich_help_panel=_COST),
    ] = None,
    dense_layer: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Size of what a layer has beside its experts: attention, router, shared experts.",
            rich_help_panel=_COST,
        ),
    ] = None,
    timed: Annotated[
        bool,
        typer.Option(
            "--timed",
            help="Go event by event through the live decision loop under a simulated clock, instead of counting.",
            rich_help_panel=_COST,
        ),
    ] = False,
    predictor: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="What says which experts come next, with commas between them (docs/predictors.md). Implies --timed. "
            "Default: none.",
            rich_help_panel=_COST,
        ),
    ] = None,
    prefetch_depth: Annotated[
        int | None,
        typer.Option(metavar="D", min=1, help="How many layers ahead to fetch. Default: 2.", rich_help_panel=_COST),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="Where experts are computed: cpu, or gpu for the accelerator that was measured. Implies --timed.",
            rich_help_panel=_COST,
        ),
    ] = "cpu",
    host_capacity: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="What host memory holds behind the accelerator's cache.", rich_help_panel=_COST
        ),
    ] = "100%",
    sweep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Replay a grid on all cores, keep rows in FILE as they come, and go on from it when run again. "
            'A list of values for a parameter is a choice: "hobbit(lfu=[0.2, 0.5])".',
            rich_help_panel=_GRID,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes of a sweep. Default: one a core.", rich_help_panel=_GRID),
    ] = None,
    json_output: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw hit rate and tokens/s against capacity: a .png or .svg."),
    ] = None,
) -> None:
    """Replay recorded traces under other cache policies and sizes.

    Hits are counted event by event: all experts of a layer's event are looked up against the cache before it, the first
    touch of an expert is a miss, and members are touched in ascending router weight. LRU and Belady's rules, which know
    the future, are always replayed beside: "gap closed" is how much of the distance between them a policy covers.

    With an expert's size and a measured machine (`offload profile`) the table has seconds.

    With --preset whole systems are ranked by what the simulated clock says, several precisions and fallbacks included.
    """
    with console.waiting("starting"):
        from cache.traces.trace import Trace
        from offload.decide.rules import DEPTH
        from offload.simulation.compare import Setting, expand, rounds, with_gaps
        from offload.simulation.sweep import Task, grid
        from offload.simulation.sweep import sweep as run_sweep
        from predictors.base import find_predictor

        if plot is not None:
            from offload.terminal.plot import new_figure

            new_figure()  # a missing matplotlib is said at once
    predictors = split_list(predictor or "none")
    timed = timed or set(predictors) != {"none"} or device != "cpu" or preset is not None
    setting = Setting(
        pool=pool or "layer",
        quota=quota,
        warm=warm,
        timed=timed,
        profile=profile,
        machine=_machine(machine, required=timed),
        expert_bytes=None if expert_bytes is None else parse_bytes(expert_bytes, "--expert-bytes"),
        dense_layer_bytes=0 if dense_layer is None else parse_bytes(dense_layer, "--dense-layer"),
        predictor=predictors[0],
        prefetch_depth=prefetch_depth or DEPTH,
        device=device,
        host_capacity=host_capacity,
    )
    if preset is not None:
        said = {"policy": policy, "pool": pool, "predictor": predictor, "prefetch_depth": prefetch_depth}
        unused = {"--quota": quota != "even", "--sweep": sweep, "--jobs": jobs, "--plot": plot}
        _compare_presets(traces, split_list(preset), split_list(capacity), setting, said, unused, json_output)
        return
    specs = [one for spec in split_list(policy or "lru") for one in (grid(spec) if sweep is not None else [spec])]
    chosen = expand(specs, profile is not None, notice)
    capacities = split_list(capacity)
    tasks = [
        Task(str(trace), name, tuple(capacities), replace(setting, predictor=ahead))
        for trace in traces
        for ahead, name in rounds(chosen, predictors)
    ]
    for path in traces:
        for spec in predictors:
            if find_predictor(spec).looks_ahead and Trace.open(path, check=False).predicted is None:
                notice(f"{path} has no record of what gates said ahead, which {spec} goes by")
    with progress_bar("replaying", len(tasks)) as bar:
        if sweep is not None:
            rows = run_sweep(tasks, jobs, sweep, lambda done: bar.update(done=done))
        else:
            rows = []
            for done, task in enumerate(tasks):
                bar.update(title=f"replaying {Path(task.trace).name}: {task.policy}", done=done)
                rows += task.run()
    rows = with_gaps(rows)
    _explain(rows, setting.machine is not None)
    if plot is not None:
        from offload.terminal.plot import plot_rows

        plot_rows(rows, plot)
    if json_output:
        print(json.dumps([row.as_dict() for row in rows], allow_nan=False))
        return
    from offload.terminal.replay_tables import replay_tables

    for table in replay_tables(rows):
        console.answers().print(table)


def _compare_presets(
    traces: Sequence[Path],
    names: Sequence[str],
    capacities: Sequence[str],
    setting: Any,
    said: Mapping[str, str | int | None],
    unused: Mapping[str, object],
    json_output: bool,
) -> None:
    """`--preset`: one table for each trace and capacity, or their rows as JSON."""
    from offload.simulation.presets import replay_presets
    from offload.terminal.replay_tables import preset_tables

    given = [flag for flag, value in unused.items() if value]
    if given:
        raise OffloadError(f"{given[0]} does nothing with --preset: leave it out")
    total, run = replay_presets(list(map(str, traces)), names, capacities, setting, said, notice)
    with progress_bar("replaying", total) as bar:
        rows = run(lambda done, what: bar.update(title=f"replaying {what}", done=done))
    if json_output:
        print(json.dumps([row.as_dict() for row in rows], allow_nan=False))
        return
    for table in preset_tables(rows):
        console.answers().print(table)


def split_list(text: str) -> list[str]:
    """The parts of `text` between commas, except those inside brackets. Raises OffloadError for an empty one."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise OffloadError(f'"{text}" has an empty part: write names with single commas between them')
    return parts


def _explain(rows: Sequence[Row], has_machine: bool) -> None:
    """Say why columns are empty."""
    if any(row.capacity_bytes is None for row in rows):
        notice("no bytes and no seconds: the trace does not say how large an expert is; give --expert-bytes")
    elif not has_machine:
        notice("no seconds: this machine has not been measured; run `offload profile`, or give --machine")


def _machine(path: Path | None, *, required: bool) -> Any:
    from offload.costs.machine import MachineProfile

    stored = machine_profile_path()
    if path is None and not required and not stored.exists():
        return None
    return MachineProfile.read(stored if path is None else path)
