"""`offload replay`: what other policies and capacities would have done with a recorded trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload.system.messages import notice
from offload.system.progress import progress_bar
from offload.terminal import console
from offload.terminal.exits import INTERRUPTED
from offload.terminal.flags import Json
from offload.terminal.lists import split_list
from offload.terminal.replay_flags import ReplayOptions

if TYPE_CHECKING:
    from offload.decide.preset import Preset
    from offload.simulation.rows import Row, Setting
    from offload.simulation.sweep import AnyTask


def replay(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE", help="Recorded traces, .safetensors files.")],
    json_output: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw hit rate and tokens/s against capacity: a .png or .svg."),
    ] = None,
    *,
    options: ReplayOptions,
) -> None:
    """Replay recorded traces under other cache policies and sizes.

    All experts of an event are looked up in the cache as it was before the event, and the first use of an expert is a
    miss. The experts of an event are touched in ascending order of router weight. LRU and Belady's rules, which know
    the future, always run beside the policies: "gap closed" is the share of the distance between them that a policy
    covers.

    With an expert's size and a measured machine (`offload profile`) the table has seconds.

    --preset ranks whole systems by a simulated clock, with several precisions and fallbacks. Ctrl-C keeps the rows that
    are done.
    """
    with console.waiting("starting"):
        from offload.simulation.preset_rows import ranked
        from offload.simulation.rows import with_gaps

        if plot is not None:
            from offload.terminal.plot import check_plot

            check_plot(plot)
    setting = options.setting()
    make = _preset_tasks if options.presets else _policy_tasks
    tasks = make(list(map(str, traces)), options, setting)
    done: dict[int, list[Any]] = {}
    try:
        _run(tasks, options, done)
    except KeyboardInterrupt:
        what = ": run it again to go on" if options.sweep is not None else ""
        notice(f"stopped: {len(done)} of {len(tasks)} replays are done{what}")
    rows: list[Any] = [row for number in sorted(done) for row in done[number]]
    if options.presets:
        rows = ranked(rows)
    else:
        rows = with_gaps(rows)
        _explain(rows, setting.machine is not None)
        _tell_of_tight_caches(rows)
    _show(rows, setting, plot, json_output)
    if len(done) < len(tasks):
        raise typer.Exit(INTERRUPTED)


def _policy_tasks(traces: Sequence[str], options: ReplayOptions, setting: Setting) -> Sequence[AnyTask]:
    """Every policy, with every predictor, on every trace, and what has no effect said. Raises OffloadError."""
    from offload.decide.preset import Preset
    from offload.simulation.compare import expand, rounds
    from offload.simulation.sweep import Task, grid

    named = split_list(options.policy or "lru")
    specs = named if options.sweep is None else [one for spec in named for one in grid(spec)]
    chosen = expand(specs, options.profile is not None, notice)
    pairs = rounds(chosen, options.predictors)
    plain = Preset(name="", pool=setting.pool, quota=setting.quota, source="")
    ahead = replace(plain, prefetcher=setting.prefetcher, prefetch_depth=setting.prefetch_depth)
    systems = [replace(plain if name == "none" else ahead, policy=policy, predictor=name) for name, policy in pairs]
    _tell_of_unused(traces, systems, options, setting)
    capacities = tuple(dict.fromkeys(split_list(options.capacity)))
    return [
        Task(trace, policy, capacities, replace(setting, predictor=name)) for trace in traces for name, policy in pairs
    ]


def _preset_tasks(traces: Sequence[str], options: ReplayOptions, setting: Setting) -> Sequence[AnyTask]:
    """Every preset on every trace at every capacity, and what has no effect said. Raises OffloadError."""
    from offload.simulation.presets import preset_tasks

    said = options.parts
    tasks = preset_tasks(traces, options.presets, split_list(options.capacity), setting, said, notice)
    systems = {task.preset.name: task.preset for task in tasks}
    _tell_of_unused(traces, list(systems.values()), options, setting)
    return tasks


def _tell_of_unused(traces: Sequence[str], systems: Sequence[Preset], options: ReplayOptions, setting: Setting) -> None:
    from cache.traces.trace import Trace
    from offload.simulation.unused import unused

    for line in unused([Trace.open(trace, check=False) for trace in traces], systems, setting, options.parts):
        notice(line)


def _run(tasks: Sequence[AnyTask], options: ReplayOptions, done: dict[int, list[Any]]) -> None:
    """Run `tasks`, with progress; `done` has the rows of each as they come, also of those before a Ctrl-C."""
    from offload.simulation.sweep import sweep

    with progress_bar("replaying", len(tasks)) as bar:
        jobs = 1 if options.sweep is None else options.jobs
        for number, rows in sweep(
            tasks, jobs, options.sweep, lambda task: bar.update(title=f"replaying {task.title}", done=len(done))
        ):
            done[number] = rows
            bar.update(done=len(done))


def _show(rows: Sequence[Any], setting: Setting, plot: Path | None, json_output: bool) -> None:
    """The figure, and JSON or tables, of rows of one kind."""
    if plot is not None and rows:
        from offload.terminal.plot import plot_rows

        plot_rows(rows, plot)
    if json_output:
        console.print_json([row.as_dict() for row in rows])
        return
    from offload.terminal.replay_tables import tables
    from offload.terminal.tables import show

    show(tables(rows), setting.machine)


def _explain(rows: Sequence[Row], has_machine: bool) -> None:
    """Say why columns are empty."""
    if any(row.capacity_bytes is None for row in rows):
        notice("no bytes and no seconds: the trace does not say how large an expert is; give --expert-bytes")
    elif not has_machine:
        notice("no seconds: this machine has not been measured; run `offload profile`, or give --machine")


def _tell_of_tight_caches(rows: Sequence[Row]) -> None:
    """Say so if each layer's cache has room for one event's experts at most: then there is nothing to choose."""
    from cache.traces.trace import Trace

    opened = {name: Trace.open(name, check=False) for name in {row.trace for row in rows}}
    needed = {name: trace.num_layers * trace.top_k for name, trace in opened.items()}  # by a pass of one token
    divided = [row for row in rows if (row.pool, row.quota) == ("layer", "even")]
    tight = dict.fromkeys(row.capacity for row in divided if row.capacity_slots <= needed[row.trace])
    if tight:
        notice(
            f"capacity {', '.join(tight)}: every event needs at least as many experts as a layer's cache has places, "
            "so policies without bypass cannot differ: try --pool global or a larger --capacity"
        )
