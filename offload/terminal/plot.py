"""Figures for reports, drawn with matplotlib where it is installed: an optional dependency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import OffloadError
from cache.outputs import check_output, output

if TYPE_CHECKING:
    from offload.simulation.preset_rows import PresetRow
    from offload.simulation.rows import Row

_MARKS = "os^vDPX*<>phd8"
_DASHES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (6, 2, 1, 2, 1, 2)))


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


def plot_rows(rows: Sequence[Row | PresetRow], path: Path) -> None:
    """Hit rate and tokens/s of `rows` against capacity, a line of plots for each trace, drawn to `path`.

    Lines differ in their marks and dashes, too, for those who see or print no colours. Raises OffloadError without
    matplotlib.
    """
    traces = list(dict.fromkeys(row.trace for row in rows))
    quantities = [("hit rate", "hit_rate")]
    if all(row.tokens_per_s is not None for row in rows):
        quantities.append(("tokens/s", "tokens_per_s"))
    figure = new_figure(width=len(quantities))
    figure.set_figheight(4.5 * len(traces))
    axes = figure.subplots(len(traces), len(quantities), squeeze=False)
    labels = _labels(rows)
    styles = line_styles(list(dict.fromkeys(labels)))
    legend: dict[str, Any] = {}
    for trace, line in zip(traces, axes, strict=True):
        for (title, name), axis in zip(quantities, line, strict=True):
            here = [(label, row) for label, row in zip(labels, rows, strict=True) if row.trace == trace]
            for each in dict.fromkeys(label for label, _ in here):
                points = sorted((row.capacity_fraction, getattr(row, name)) for label, row in here if label == each)
                (drawn,) = axis.plot(*zip(*points, strict=True), label=each, linewidth=1.2, **styles[each])
                legend.setdefault(each, drawn)
            axis.set_xlabel("share of the experts that fit")
            axis.set_ylabel(title)
            axis.set_title(Path(trace).name, fontsize=9)
            axis.grid(alpha=0.3)
    # Beside the plots, the best first: two dozen names hide the lines.
    best = sorted(legend, key=lambda label: -legend[label].get_ydata()[0])
    figure.legend([legend[label] for label in best], best, loc="outside right upper", fontsize=7)
    save_figure(figure, path)


def line_styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How matplotlib draws each label's line: up to 78 have marks and dashes of their own, and brackets are black."""
    from offload.simulation.rows import BRACKETS

    styles = {}
    for number, (label, (dash, mark)) in enumerate(zip(labels, cycle(product(_DASHES, _MARKS)), strict=False)):
        color = "black" if label in BRACKETS else f"C{number % 10}"
        styles[label] = {"color": color, "marker": mark, "markersize": 4, "linestyle": dash}
    return styles


def _labels(rows: Sequence[Row | PresetRow]) -> list[str]:
    """What each row's line is called: a preset, or a policy, with its parameters where it alone is not enough."""
    from offload.simulation.preset_rows import PresetRow

    presets = [row.preset for row in rows if isinstance(row, PresetRow)]
    if presets:
        return presets
    policies = [row for row in rows if not isinstance(row, PresetRow)]
    counts = Counter(policy for policy, _ in {(row.policy, str(row.params)) for row in policies})
    labels = []
    for row in policies:
        params = ", ".join(f"{name}={value}" for name, value in row.params.items())
        label = f"{row.policy}({params})" if counts[row.policy] > 1 else row.policy
        labels.append(label if row.predictor == "none" else f"{label} with {row.predictor}")
    return labels
