"""`offload trace ...`: record a routing trace, save an interrupted recording, say what a trace is like."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cache.errors import ModelError, OffloadError
from offload import terminal
from offload.cli import INTERRUPTED
from offload.options import Json, LoadOptions, SamplingOptions, flat

_LONGEST_REPLY = 256  # tokens, where neither a flag nor the model says

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
    from cache.trace_writer import check_free
    from offload import commands

    texts = read_prompts(prompts)[:limit]
    if not force:
        check_free(output)
    with commands.load_model(model, options) as loaded:
        from offload.reply import Interrupt, seed_sampling

        ids = [_prompt_ids(loaded, model, text) for text in texts]
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
            with Interrupt() as interrupt, recording as recorder, _progress(len(ids)) as advance:
                for prompt in ids:
                    _answer(loaded, prompt, sampling, interrupt)
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
    from cache.trace_writer import recover as recover_trace

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
        from cache.trace import Trace
        from offload.plot import new_figure
        from offload.trace_info import info_tables, plot_info, trace_info

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


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file of JSON lines. Raises OffloadError for what is none, and OSError."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt.strip():
            raise OffloadError(f'{path}, line {number}: not a JSON object with a text as its "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise OffloadError(f"{path} has no prompts: write one JSON object a line")
    return prompts


def _prompt_ids(model: Any, name: str, text: str) -> list[int]:
    """The token ids of a prompt, as `chat` would ask it, or plain where the model has no chat template."""
    from offload.chat import Conversation

    if model.tokenizer is None:
        raise ModelError(f"{name} has no tokenizer: its prompts cannot be read")
    if model.tokenizer.chat_template:
        return Conversation(model, name).fit(text, model.context)[0]
    return list(model.tokenizer(text)["input_ids"])


def _answer(model: Any, prompt: list[int], sampling: SamplingOptions, interrupt: Any) -> None:
    """Generates the reply to `prompt`. Raises KeyboardInterrupt between two tokens if Ctrl-C was pressed."""
    import torch
    from transformers import StoppingCriteriaList

    from offload.reply import check_ids, reply_limit, sampling_arguments

    check_ids(model, prompt)
    ids = torch.tensor([prompt], device=model.device)

    def stop(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        if interrupt.requested:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=reply_limit(model, len(prompt), sampling, default=_LONGEST_REPLY),
        stopping_criteria=StoppingCriteriaList([stop]),
        **sampling_arguments(sampling),
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """A bar on standard error that counts prompts; yields what to call after each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = sys.stderr.isatty()
    with Progress(*columns, console=terminal.console(), transient=True, disable=not shown) as bars:
        task = bars.add_task("recording prompts", total=total)
        yield lambda: bars.advance(task)
