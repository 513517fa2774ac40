"""`offload calibrate`: what makes looking through the next gates better, measured and stored for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cache.errors import OffloadError
from offload import terminal
from offload.cli import INTERRUPTED
from offload.options import Json, LoadOptions, SamplingOptions, flat
from offload.paths import calibration_path
from offload.prompts import answer, progress, prompt_ids, read_prompts


@flat
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or its id on the hub.")],
    prompts: Annotated[
        Path,
        typer.Option(metavar="FILE", help='Prompts to answer: a JSON object a line, its "prompt" is the text.'),
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", metavar="N", min=2, help="Only the first N prompts.")
    ] = None,
    depth: Annotated[int, typer.Option(metavar="D", min=1, help="Measure how well 1 to D layers ahead are known.")] = 3,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to store it. Default: offload's cache folder, where it is found by itself.",
        ),
    ] = None,
    json_output: Json = False,
    *,
    sampling: SamplingOptions,
    options: LoadOptions,
) -> None:
    """Measure by how much the inputs of neighbouring gates differ, and what knowing it is worth.

    Every second prompt is measured on. On the others, the experts that the next gates name are compared with those that
    are chosen in the end, with the average difference added and without.
    """
    from offload import commands

    texts = read_prompts(prompts)[:limit]
    if len(texts) < 2:
        raise OffloadError(f"{prompts} has one prompt: give two or more, one to measure on and one to compare on")
    with commands.load_model(model, options) as loaded:
        from offload.calibration import Calibration, MeanInputs, Recall, attached, gates_fingerprint
        from offload.reply import Interrupt, seed_sampling

        inner, experts = loaded._open_model, loaded._experts
        ids = [prompt_ids(loaded, model, text) for text in texts]
        seed_sampling(sampling)
        try:
            with Interrupt() as interrupt, progress("running prompts", len(ids)) as advance:
                means = MeanInputs(inner, experts)
                with attached(means):
                    for prompt in ids[::2]:
                        answer(loaded, prompt, sampling, interrupt)
                        advance()
                offsets = means.offsets()
                plain, moved = Recall(inner, experts, depth), Recall(inner, experts, depth, offsets)
                with attached(plain, moved):
                    for prompt in ids[1::2]:
                        answer(loaded, prompt, sampling, interrupt)
                        advance()
        except KeyboardInterrupt:
            terminal.notice("stopped: nothing was stored")
            raise typer.Exit(INTERRUPTED) from None
        found = Calibration(
            gates_fingerprint(inner, experts),
            offsets,
            {"model": model, "workload": prompts.name, "tokens": str(means.tokens)},
        )
        path = output or calibration_path(found.fingerprint)
        found.write(path)
    figures = {
        "model": model,
        "workload": prompts.name,
        "tokens": means.tokens,
        "file": str(path),
        "recall": plain.share.tolist(),
        "recall_with_offsets": moved.share.tolist(),
    }
    if json_output:
        print(json.dumps(figures, ensure_ascii=False, allow_nan=False))
    else:
        terminal.answers().print(_table(figures))
    terminal.dim(f"stored in {path}: from {means.tokens} tokens of {prompts.name}")


def _table(figures: dict[str, Any]) -> Table:
    table = Table("layers ahead", box=None, header_style="dim")
    for column in ("of the first K", "with offsets", "of all 2K", "with offsets"):
        table.add_column(column, justify="right")
    for distance, (plain, moved) in enumerate(zip(figures["recall"], figures["recall_with_offsets"], strict=True), 1):
        shares = (plain[0], moved[0], plain[1], moved[1])
        table.add_row(str(distance), *(f"{share:.1%}" for share in shares))
    return table
