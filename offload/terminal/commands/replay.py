"""`offload replay`: what other policies and capacities would have done with a recorded trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import OffloadError
from offload.system.messages import notice
from offload.system.progress import progress_bar
from offload.terminal import console
from offload.terminal.flags import Json
from offload.terminal.replay_flags import ReplayOptions, split_list

if TYPE_CHECKING:
    from offload.simulation.rows import Row, Setting


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

    --preset ranks whole systems by a simulated clock, with several precisions and fallbacks.
    """
    with console.waiting("starting"):
        import offload.simulation.sweep  # noqa: F401  # brings NumPy

        if plot is not None:
            from offload.terminal.plot import check_plot

            check_plot(plot)
    if options.preset is not None:
        _compare_presets(traces, options, plot, json_output)
        return
    setting = options.setting()
    rows = _replayed(traces, options, setting)
    _explain(rows, setting.machine is not None)
    _tell_of_tight_caches(rows)
    if plot is not None:
        from offload.terminal.plot import plot_rows

        plot_rows(rows, plot)
    if json_output:
        console.print_json([row.as_dict() for row in rows])
        return
    from offload.terminal.replay_tables import replay_tables
    from offload.terminal.tables import show

    show(replay_tables(rows), setting.machine)


def _replayed(traces: Sequence[Path], options: ReplayOptions, setting: Setting) -> list[Row]:
    """The rows of every policy, with every predictor, on every trace. Raises OffloadError."""
    from cache.traces.trace import Trace
    from offload.simulation.compare import expand, rounds, with_gaps
    from offload.simulation.sweep import Task, grid
    from offload.simulation.sweep import sweep as run_sweep
    from predictors.base import find_predictor

    if options.placement is not None:
        raise OffloadError("--placement does nothing without --preset: leave it out")
    if options.prefetcher is not None and set(options.predictors) == {"none"}:
        raise OffloadError("--prefetcher does nothing without a --predictor: leave it out")
    named = split_list(options.policy or "lru")
    specs = named if options.sweep is None else [one for spec in named for one in grid(spec)]
    chosen = expand(specs, options.profile is not None, notice)
    capacities = tuple(split_list(options.capacity))
    tasks = [
        Task(str(trace), name, capacities, replace(setting, predictor=ahead))
        for trace in traces
        for ahead, name in rounds(chosen, options.predictors)
    ]
    for path in traces:
        for spec in options.predictors:
            if find_predictor(spec).looks_ahead and Trace.open(path, check=False).predicted is None:
                notice(f"{path} has no record of what gates said ahead, which {spec} goes by")
    with progress_bar("replaying", len(tasks)) as bar:
        if options.sweep is not None:
            return with_gaps(run_sweep(tasks, options.jobs, options.sweep, lambda done: bar.update(done=done)))
        rows: list[Row] = []
        for done, task in enumerate(tasks):
            bar.update(title=f"replaying {Path(task.trace).name}: {task.policy}", done=done)
            rows += task.run()
        return with_gaps(rows)


def _compare_presets(traces: Sequence[Path], options: ReplayOptions, plot: Path | None, json_output: bool) -> None:
    """`--preset`: one table for each trace and capacity, or their rows as JSON."""
    from offload.simulation.presets import replay_presets
    from offload.terminal.replay_tables import preset_tables
    from offload.terminal.tables import show

    unused = {"--sweep": options.sweep, "--jobs": options.jobs, "--plot": plot}
    flags = [flag for flag, value in unused.items() if value]
    if flags:
        raise OffloadError(f"{flags[0]} does nothing with --preset: leave it out")
    parts = "policy", "pool", "quota", "predictor", "prefetcher", "prefetch_depth", "placement"
    said: dict[str, Any] = {name: getattr(options, name) for name in parts}
    names, capacities = split_list(options.preset or ""), split_list(options.capacity)
    setting = options.setting()
    total, run = replay_presets(list(map(str, traces)), names, capacities, setting, said, notice)
    with progress_bar("replaying", total) as bar:
        rows = run(lambda done, what: bar.update(title=f"replaying {what}", done=done))
    if json_output:
        console.print_json([row.as_dict() for row in rows])
        return
    show(preset_tables(rows), setting.machine)


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
