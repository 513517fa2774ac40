"""Figures for reports, drawn with matplotlib where it is installed: an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import OffloadError
from cache.outputs import check_output, output

if TYPE_CHECKING:
    from offload.simulation.rows import Row


def check_plot(path: Path) -> None:
    """Says before the work what would keep a figure from `path`. Raises OffloadError."""
    figure = new_figure()
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise OffloadError(f"--plot {path}: a figure is {', '.join(f'.{name}' for name in sorted(known))}")
    check_output(path)


def new_figure(width: int = 1) -> Any:
    """An empty figure with room for `width` plots side by side. Raises OffloadError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OffloadError("--plot needs matplotlib: run `pip install matplotlib`") from error
    return Figure(figsize=(6 * width, 4.5), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write `figure` to `path`, in the format that its name ends in. Raises OutputError and DiskSpaceError."""
    with output(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:].lower())


def plot_rows(rows: Sequence[Row], path: Path) -> None:
    """Hit rate and tokens/s of `rows` against capacity, a line of plots for each trace, drawn to `path`.

    Raises OffloadError without matplotlib.
    """
    from offload.simulation.rows import BRACKETS

    traces = list(dict.fromkeys(row.trace for row in rows))
    quantities = [("hit rate", "hit_rate")]
    if all(row.tokens_per_s is not None for row in rows):
        quantities.append(("tokens/s", "tokens_per_s"))
    figure = new_figure(width=len(quantities))
    figure.set_figheight(4.5 * len(traces))
    axes = figure.subplots(len(traces), len(quantities), squeeze=False)
    for trace, line in zip(traces, axes, strict=True):
        for (label, name), axis in zip(quantities, line, strict=True):
            here = [row for row in rows if row.trace == trace]
            for policy, params in dict.fromkeys((row.policy, str(row.params)) for row in here):
                points = sorted(
                    (row.capacity_fraction, getattr(row, name))
                    for row in here
                    if (row.policy, str(row.params)) == (policy, params)
                )
                style = {"color": "black", "linestyle": "--"} if policy in BRACKETS else {"marker": "."}
                axis.plot(*zip(*points, strict=True), label=policy, linewidth=1.2, **style)
            axis.set_xlabel("share of the experts that fit")
            axis.set_ylabel(label)
            axis.set_title(Path(trace).name, fontsize=9)
            axis.grid(alpha=0.3)
    # Beside the plots, the best first: two dozen names hide the lines.
    best = sorted(zip(*axes[0][0].get_legend_handles_labels(), strict=True), key=lambda pair: -pair[0].get_ydata()[0])
    figure.legend(*zip(*best, strict=True), loc="outside right upper", fontsize=7)
    save_figure(figure, path)
