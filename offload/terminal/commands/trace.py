"""`offload trace ...`: record a routing trace, save an interrupted recording, say what a trace is like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offload.options import LoadOptions, SamplingOptions
from offload.system.messages import notice
from offload.system.progress import progress_bar
from offload.talk.prompts import answer, prompt_ids, read_prompts
from offload.terminal import console, loading
from offload.terminal.exits import INTERRUPTED
from offload.terminal.flags import MOST_LAYERS, Json, Model, PromptFile

TracePath = Annotated[Path, typer.Argument(metavar="TRACE", help="A recorded trace, a .safetensors file.")]

Predicted = Annotated[
    int,
    typer.Option(
        hidden=True,
        metavar="D",
        min=0,
        max=MOST_LAYERS,
        help="Also record what the gates of the next D layers say of each gate's input.",
    ),
]

Inputs = Annotated[
    bool,
    typer.Option(
        "--inputs",
        hidden=True,
        help="Also record the tokens themselves, and a sketch of their embeddings. The trace then says what was read.",
    ),
]


def record(
    model: Model,
    prompts: PromptFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="TRACE", help="The trace to write, a .safetensors file.")
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", metavar="N", min=1, help="Only the first N prompts.")
    ] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Also record the router's scores of all experts.")] = False,
    predicted: Predicted = 0,
    inputs: Inputs = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a trace, or an interrupted recording, that exists.")
    ] = False,
    *,
    sampling: SamplingOptions,
    options: LoadOptions,
) -> None:
    """Answer prompts one after the other, and record which experts every token goes to.

    Prompts go through the model's chat template, if it has one. Ctrl-C keeps what is finished. If the program is
    killed, `offload trace recover` saves that.
    """
    from cache.traces.writer import check_free

    texts = read_prompts(prompts)[:limit]
    check_free(output, overwrite=force)
    with loading.load_model(model, options) as loaded:
        from offload.talk.reply import Interrupt, seed_sampling

        ids = [prompt_ids(loaded, model, text) for text in texts]
        seed_sampling(sampling)
        recording = loaded.record_trace(
            output,
            scores=scores,
            predicted=predicted,
            inputs=inputs,
            workload=prompts.name,
            seed=sampling.seed,
            overwrite=force,
        )
        try:
            with Interrupt() as interrupt, recording as recorder, progress_bar("recording prompts", len(ids)) as bar:
                for prompt in ids:
                    answer(loaded, prompt, sampling, interrupt)
                    bar.advance()
        except KeyboardInterrupt:
            kept = recorder.num_sequences
            what = f"{output} has the {kept} finished of {len(ids)} sequences" if kept else "nothing was recorded"
            notice(f"stopped: {what}")
            raise typer.Exit(INTERRUPTED) from None
    console.dim(f"{output}: {len(ids)} sequences; `offload trace info {output}` says what they are like")


def recover(trace: TracePath) -> None:
    """Make a trace of what a killed recording had finished.

    TRACE is the file that the recording was to write. Do not use it while the recording runs.
    """
    from cache.traces.writer import recover as recover_trace

    console.dim(f"{trace}: {recover_trace(trace)} sequences")


def info(
    trace: TracePath,
    json_output: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw hit rate against capacity, and the layers: a .png or .svg."),
    ] = None,
) -> None:
    """Say what a trace is and how well its experts could be cached.

    Prints overlap with the token before, load entropy, the experts that events need, SRP and SCH for segments of 4
    to 256 tokens, and LRU's hit rate at every capacity. docs/traces.md says what each of them means.
    """
    with console.waiting("reading the trace"):
        from cache.traces.trace import Trace
        from offload.terminal.plot import check_plot
        from offload.terminal.trace_tables import info_tables, plot_info
        from offload.traces.info import trace_info

        if plot is not None:
            check_plot(plot)
        figures = trace_info(Trace.open(trace))
    if plot is not None:
        plot_info(figures, plot)
    if json_output:
        console.print_json(figures)
        return
    for table in info_tables(figures):
        console.answers().print(table)
