"""`offload train-predictor`: learns from recorded traces which experts come next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cache.outputs import check_output
from offload.system.messages import notice
from offload.terminal import console
from offload.terminal.flags import MOST_LAYERS, Json


def train_predictor(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE", help="Recorded traces of one model.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="What was learned, a .safetensors file.")
    ],
    depth: Annotated[
        int | None,
        typer.Option(metavar="D", min=1, max=MOST_LAYERS, help="Learn to look 1 to D layers ahead. Default: 3."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=MOST_LAYERS, help="Look at the last N layers. Default: 6.")
    ] = None,
    hold_out: Annotated[
        int,
        typer.Option(metavar="N", min=2, max=10**6, help="Compare on every N-th sequence, and do not learn from it."),
    ] = 5,
    json_output: Json = False,
) -> None:
    """Learn from traces which experts the next layers need, for the predictor learned(file="FILE").

    Prints which share of the needed experts is among the K and the 2K that it finds likeliest, on sequences that it
    did not learn from. Beside it are the experts used most in training, and those used most of late.
    """
    check_output(output)
    with console.waiting("learning"):
        from cache.traces.trace import Trace
        from predictors.training import fit

        opened = [Trace.open(trace) for trace in traces]
        layers = opened[0].num_layers
        for flag, value, what in (("--depth", depth, "ahead"), ("--window", window, "back")):
            if value is not None and value > layers:
                notice(f"{flag} {value}: {opened[0].name} has {layers} layers, so it looks {layers} {what}")
        learned, compared = fit(opened, depth=depth or 3, window=window or 6, hold_out=hold_out)
        learned.write(output)
    if json_output:
        console.print_json({"file": str(output), "ahead": learned.ahead, "recall": [c._asdict() for c in compared]})
        return
    table = Table("layers ahead", box=None, header_style="dim")
    for name in ("used most", "of late", "learned"):
        for first in ("K", "2K"):
            table.add_column(f"{name}, {first}", justify="right")
    for row in compared:
        shares = (*row.frequency, *row.recent, *row.learned)
        table.add_row(str(row.distance), *(f"{share:.1%}" for share in shares))
    console.answers().print(table)
    console.dim(f'stored in {output}: name it as learned(file="{output}")')
