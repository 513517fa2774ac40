"""`offload replay`: what other policies and capacities would have done with a recorded trace."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import OffloadError
from offload.options import Json
from offload.system.paths import machine_profile_path
from offload.system.sizes import format_bytes, parse_bytes
from offload.terminal import console as terminal

if TYPE_CHECKING:
    from rich.table import Table

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
    with terminal.waiting("starting"):
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
    chosen = expand(specs, profile is not None, terminal.notice)
    capacities = split_list(capacity)
    tasks = [
        Task(str(trace), name, tuple(capacities), replace(setting, predictor=ahead))
        for trace in traces
        for ahead, name in rounds(chosen, predictors)
    ]
    for path in traces:
        for spec in predictors:
            if find_predictor(spec).looks_ahead and Trace.open(path, check=False).predicted is None:
                terminal.notice(f"{path} has no record of what gates said ahead, which {spec} goes by")
    with _progress(len(tasks)) as advance:
        if sweep is not None:
            rows = run_sweep(tasks, jobs, sweep, lambda done: advance(done, ""))
        else:
            rows = []
            for done, task in enumerate(tasks):
                advance(done, f"{Path(task.trace).name}: {task.policy}")
                rows += task.run()
    rows = with_gaps(rows)
    _explain(rows, setting.machine is not None)
    if plot is not None:
        from offload.terminal.replay_plot import plot_rows

        plot_rows(rows, plot)
    if json_output:
        print(json.dumps([row.as_dict() for row in rows], allow_nan=False))
        return
    for table in tables(rows):
        terminal.answers().print(table)


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
    from offload.terminal.replay_tables import preset_tables, replay_presets

    given = [flag for flag, value in unused.items() if value]
    if given:
        raise OffloadError(f"{given[0]} does nothing with --preset: leave it out")
    total, run = replay_presets(list(map(str, traces)), names, capacities, setting, said, terminal.notice)
    with _progress(total) as advance:
        rows = run(advance)
    if json_output:
        print(json.dumps([row.as_dict() for row in rows], allow_nan=False))
        return
    for table in preset_tables(rows):
        terminal.answers().print(table)


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


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table for each trace and capacity, the best hit rate first."""
    from rich.table import Table

    found = []
    ahead = any(row.prefetch_depth for row in rows)
    for trace, capacity in dict.fromkeys((row.trace, row.capacity) for row in rows):
        here = sorted(
            (r for r in rows if (r.trace, r.capacity) == (trace, capacity)), key=lambda row: _merit(row, ahead)
        )
        first = here[0]
        where = f"{first.capacity_slots} experts, {first.capacity_fraction:.1%}"
        if first.capacity_bytes is not None:
            where += f", {format_bytes(first.capacity_bytes)}"
        mode = f"{first.pool} pool, {'warm' if first.warm else 'cold'}"
        table = Table(title=f"{Path(trace).name}: {capacity} ({where}), {mode}", title_justify="left")
        table.add_column("policy")
        for column in ("hit rate", "misses", "moved", "stall s", "tokens/s", "gap closed", "with bypass"):
            table.add_column(column, justify="right")
        table.add_column("kind")
        for row in here:
            table.add_row(*_cells(row))
        found.append(table)
    return found


def _merit(row: Row, ahead: bool) -> float:
    """What rows are sorted by: hits, or speed where some prefetch, since those are no hits."""
    return -(row.tokens_per_s or 0.0) if ahead else -row.hits


def _cells(row: Row) -> list[str]:
    params = ", ".join(f"{name}={value}" for name, value in row.params.items())
    kind = ["" if row.causal else "knows the future", "" if row.admission == "forced" else row.admission]
    if row.prefetch_depth:
        kind.append(f"{row.predictor}, {row.prefetch_depth} ahead: {row.useful_prefetches:,} of use")
    kind.append("" if row.profile is None else f"trained on {Path(row.profile).name}")
    return [
        f"{row.policy}({params})" if params else row.policy,
        f"{row.hit_rate:.4f}",
        f"{row.misses:,}",
        "" if row.bytes_moved is None else format_bytes(row.bytes_moved),
        "" if row.stall_s is None else f"{row.stall_s:,.1f}",
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.2f}",
        "" if row.gap_closed is None else f"{row.gap_closed:.1%}",
        "" if row.gap_closed_bypass is None else f"{row.gap_closed_bypass:.1%}",
        ", ".join(part for part in kind if part),
    ]


def _explain(rows: Sequence[Row], has_machine: bool) -> None:
    """Say why columns are empty."""
    if any(row.capacity_bytes is None for row in rows):
        terminal.notice("no bytes and no seconds: the trace does not say how large an expert is; give --expert-bytes")
    elif not has_machine:
        terminal.notice("no seconds: this machine has not been measured; run `offload profile`, or give --machine")


def _machine(path: Path | None, *, required: bool) -> Any:
    from offload.costs.machine import MachineProfile

    stored = machine_profile_path()
    if path is None and not required and not stored.exists():
        return None
    return MachineProfile.read(stored if path is None else path)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, str], object]]:
    """A bar on standard error; yields what to call with the number of replays done and the one that begins."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("replaying {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal.console(), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("", total=total)
        yield lambda done, what: bars.update(task, completed=done, description=what)
