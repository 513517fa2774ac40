"""`offload trace import`: a trace of what another program logged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import OffloadError
from offload.system.messages import notice
from offload.system.progress import progress_bar
from offload.terminal import console
from offload.terminal.exits import INTERRUPTED

if TYPE_CHECKING:
    from cache.traces.imports.logged import ImportOptions
    from cache.traces.imports.read import Log

Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="A log, or a folder of logs.")]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="The trace to write, a .safetensors file.")]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="The layers of vLLM's arrays that have experts: 1,3,5. Default: all that are not full of zeros.",
    ),
]


def import_log(
    source: Source,
    output: Output,
    format: Annotated[
        str,
        typer.Option(metavar="NAME", help="transformers, vllm, orders-in-chaos, or auto, which goes by the files."),
    ] = "auto",
    num_experts: Annotated[
        int | None,
        typer.Option(metavar="E", min=1, max=2**16, help="Experts of a layer. Logs of expert ids do not say it."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="Experts a token goes to. Logits do not say it.")
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="The first N tokens of every sequence are its prompt."),
    ] = None,
    layers: Layers = None,
    scores: Annotated[bool, typer.Option("--scores", help="Also keep the logits, as scores of all experts.")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", metavar="N", min=1, help="Only the first N sequences.")
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="What was recorded: the trace says it.")] = "unknown",
    workload: Annotated[
        str | None, typer.Option(metavar="NAME", help="What it was doing. Default: what SOURCE is called.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a trace, or an interrupted recording, that exists.")
    ] = False,
) -> None:
    """Make a trace of what another program logged: transformers, vLLM, or the traces of "Orders in Chaos".

    docs/traces.md has the few lines of Python that save such a log. Pickles are not read. What is not as a log must be
    is refused, saying where. Ctrl-C keeps what is finished.
    """
    with console.waiting("starting"):
        from cache.traces.imports.logged import ImportOptions
        from cache.traces.imports.read import Log

        options = ImportOptions(num_experts, top_k, prompt_tokens, _numbers(layers), scores, limit)
        log = Log(source, format)
    done = _written(log, output, options, model=model, workload=workload, overwrite=force)
    console.dim(f"{output}: {done} sequences of {log.format}; `offload trace info {output}` says what they are like")


def _written(log: Log, output: Path, options: ImportOptions, **said: Any) -> int:
    """How many sequences were written, with a bar that shows how far it is. Raises OffloadError, and typer.Exit."""
    total = min(log.total, options.limit or log.total)
    done = 0
    with progress_bar("importing", total) as bar:

        def advance() -> None:
            nonlocal done
            done += 1
            bar.advance()

        try:
            log.write(output, options, on_sequence=advance, **said)
        except KeyboardInterrupt:
            what = f"{output} has the {done} finished of {total} sequences" if done else "nothing was written"
            notice(f"stopped: {what}")
            raise typer.Exit(INTERRUPTED) from None
    return done


def _numbers(text: str | None) -> tuple[int, ...] | None:
    """The ascending layers that `--layers` names. Raises OffloadError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    numbers = tuple(int(part) for part in parts if part.isascii() and part.isdigit())
    if len(numbers) < len(parts) or list(numbers) != sorted(set(numbers)):
        raise OffloadError(f'--layers "{text}": write ascending numbers with commas between them, such as 1,3,5')
    return numbers
