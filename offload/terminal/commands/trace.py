"""`offload trace ...`: record a routing trace, save an interrupted recording, say what a trace is like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from offload.options import Json, LoadOptions, SamplingOptions, flat
from offload.talk.prompts import answer, progress, prompt_ids, read_prompts
from offload.terminal import console as terminal
from offload.terminal.main import INTERRUPTED

trace_app = typer.Typer(help="Record which experts a model's tokens go to, and study what was recorded.")
TracePath = Annotated[Path, typer.Argument(metavar="TRACE", help="A recorded trace, a .safetensors file.")]


@trace_app.command()
@flat
def record(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or its id on the hub.")],
    prompts: Annotated[
        Path,
        typer.Option(metavar="FILE", help='Prompts to answer: a JSON object a line, its "prompt" is the text.'),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="TRACE", help="The trace to write, a .safetensors file.")
    ],
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first N prompts.")] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Also record the router's scores of all experts.")] = False,
    predicted: Annotated[
        int,
        typer.Option(
            metavar="D", min=0, help="Also record what the gates of the next D layers say of each gate's input."
        ),
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a trace, or an interrupted recording, that is there already.")
    ] = False,
    *,
    sampling: SamplingOptions,
    options: LoadOptions,
) -> None:
    """Answer prompts one after the other, and record which experts every token goes to.

    Prompts go through the model's chat template, if it has one. What is finished is kept on Ctrl-C; if the program is
    killed, `offload trace recover` saves it.
    """
    from cache.traces.writer import check_free
    from offload.terminal import app as commands

    texts = read_prompts(prompts)[:limit]
    if not force:
        check_free(output)
    with commands.load_model(model, options) as loaded:
        from offload.talk.reply import Interrupt, seed_sampling

        ids = [prompt_ids(loaded, model, text) for text in texts]
        seed_sampling(sampling)
        recording = loaded.record_trace(
            output,
            scores=scores,
            predicted=predicted,
            workload=prompts.name,
            seed=sampling.seed,
            overwrite=force,
        )
        try:
            with Interrupt() as interrupt, recording as recorder, progress("recording prompts", len(ids)) as advance:
                for prompt in ids:
                    answer(loaded, prompt, sampling, interrupt)
                    advance()
        except KeyboardInterrupt:
            kept = recorder.num_sequences
            what = f"{output} has the {kept} finished of {len(ids)} sequences" if kept else "nothing was recorded"
            terminal.notice(f"stopped: {what}")
            raise typer.Exit(INTERRUPTED) from None
    terminal.dim(f"{output}: {len(ids)} sequences; `offload trace info {output}` says what they are like")


@trace_app.command()
@flat
def recover(trace: TracePath) -> None:
    """Make a trace of what a killed recording had finished.

    TRACE is what the recording was to write. Not for a recording that is still running.
    """
    from cache.traces.writer import recover as recover_trace

    terminal.dim(f"{trace}: {recover_trace(trace)} sequences")


@trace_app.command()
@flat
def info(
    trace: TracePath,
    json_output: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw hit rate against capacity, and the layers: a .png or .svg."),
    ] = None,
) -> None:
    """Say what a trace is and how well its experts could be cached.

    Overlap with the token before, load entropy, experts an event needs, SRP and SCH for segments of 4 to 256 tokens,
    and the hit rate of LRU at every capacity: docs/traces.md says what each of them means.
    """
    with terminal.waiting("reading the trace"):
        from cache.traces.trace import Trace
        from offload.terminal.plot import new_figure
        from offload.traces.info import info_tables, plot_info, trace_info

        if plot is not None:
            new_figure()  # a missing matplotlib is said at once
        figures = trace_info(Trace.open(trace))
    if plot is not None:
        plot_info(figures, plot)
    if json_output:
        print(json.dumps(figures, ensure_ascii=False, allow_nan=False))
        return
    for table in info_tables(figures):
        terminal.answers().print(table)
