"""Hit rate and tokens/s against capacity: the figure of `offload replay --plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from offload.simulation.compare import BRACKETS, Row
from offload.terminal.plot import new_figure, save_figure


def plot_rows(rows: Sequence[Row], path: Path) -> None:
    """Draw `rows`, a line of plots for each trace, to `path`. Raises OffloadError without matplotlib."""
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
