"""`offload predict`: how good predictors of the next experts are on a recorded trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload.system.messages import notice
from offload.terminal import console
from offload.terminal.flags import MOST_LAYERS, Json
from offload.terminal.lists import split_list

if TYPE_CHECKING:
    from rich.table import Table

    from cache.traces.trace import Trace


def predict(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE", help="Recorded traces, .safetensors files.")],
    predictor: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help='Predictors, with commas between them; "all" is every predictor. Parameters go in brackets: '
            '"transition(order=2)". Your own is module:Class.',
        ),
    ] = "all",
    profile: Annotated[
        Path | None,
        typer.Option(metavar="TRACE", help="Recorded trace that trains predictors which learn."),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(metavar="LAYERS", min=1, max=MOST_LAYERS, help="Number of layers to look ahead. Default: 3."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Compare what predictors say of the next layers with what a recorded trace needed.

    K is the number of experts that an event needs. Recall is the share of these experts among the likeliest K, K +
    2 or 2 K. Precision is the share of the likeliest K that were needed. The tables are about decoding; --json also
    has prompts, layers and calibration. Every predictor sees the trace from its start, and learns while it does.
    The oracle gets the trace itself.
    """
    from cache.traces.trace import Trace

    trained = None if profile is None else Trace.open(profile)
    specs = _expand(split_list(predictor), trained is not None)
    if profile is not None and not any(_goes_by_profile(spec) for spec in specs):
        notice(f"--profile {profile} does nothing: none of these predictors learns from a trace")
    found = []
    for path in traces:
        trace = Trace.open(path)
        if depth is not None and depth > trace.num_layers:
            notice(f"--depth {depth}: {trace.name} has {trace.num_layers} layers, so it looks {trace.num_layers} ahead")
        rows = []
        for spec in specs:
            with console.waiting(f"{path.name}: {spec}"):
                rows.append({"trace": trace.name, **_judged(spec, trace, trained, depth or 3)})
        found.append(rows)
    if json_output:
        console.print_json([row for rows in found for row in rows])
        return
    for rows in found:
        for table in tables(rows):
            console.answers().print(table)


def _judged(spec: str, trace: Trace, profile: Trace | None, depth: int) -> dict[str, Any]:
    """What a predictor makes of a trace; with a notice where the trace lacks what it goes by."""
    from predictors.base import find_predictor, make_predictor
    from predictors.evaluate import evaluate

    known = profile if find_predictor(spec).causal else trace
    made = make_predictor(spec, trace.num_layers, trace.num_experts, known)
    if made.looks_ahead and trace.predicted is None:
        notice(f"{trace.name} has no record of what gates said ahead, which {spec} goes by")
    learnt_from = profile.name if profile is not None and _goes_by_profile(spec) else None
    return {"spec": spec, "profile": learnt_from, **evaluate(made, trace, depth).as_dict()}


def _goes_by_profile(spec: str) -> bool:
    """Whether a profile makes a difference; what knows the future goes by the trace itself."""
    from predictors.base import find_predictor

    cls = find_predictor(spec)
    return cls.causal and cls.can_learn


def _expand(specs: Sequence[str], has_profile: bool) -> list[str]:
    """The predictors meant by a list that may say "all", each once."""
    from predictors.base import find_predictor, names

    chosen: dict[str, None] = {}
    for spec in specs:
        for name in names() if spec == "all" else [spec]:
            cls = find_predictor(name)
            if spec == "all" and cls.learns and cls.causal and not has_profile:
                notice(f"{name} is left out: it learns from a recorded trace; name one with --profile")
                continue
            chosen[name] = None
    return list(chosen)


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """What people read of one trace's rows: a line for each predictor and distance."""
    from rich.table import Table

    from predictors.evaluate import CUTS

    for title, figures in (("decoding", rows), ("prompts", [{**row, **(row["prefill"] or {})} for row in rows])):
        if title == "prompts" and all(row["prefill"] is None for row in rows):
            continue
        name = Path(rows[0]["trace"]).name
        table = Table(title=f"{name}: {title}, {figures[0]['targets']:,} events", title_justify="left")
        table.add_column("predictor")
        for column in ("layers ahead", *(f"recall@{cut}" for cut in CUTS), "precision@K", "covered"):
            table.add_column(column, justify="right")
        table.add_column("trained on")
        for row in figures:
            for distance, recall in row["recall"].items():
                first = distance == "1"
                table.add_row(
                    row["spec"] if first else "",
                    distance,
                    *(_share(recall[cut]) for cut in CUTS),
                    _share(row["precision"][distance]["K"]),
                    _share(row["coverage"][distance]),
                    Path(row["profile"]).name if first and row["profile"] else "",
                )
        yield table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
