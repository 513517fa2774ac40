"""`offload calibrate`: how gates' inputs change from layer to layer and what experts matter, measured and stored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table

from cache.errors import OffloadError
from offload.options import LoadOptions, SamplingOptions
from offload.system.messages import notice
from offload.system.paths import calibration_path
from offload.system.progress import progress_bar
from offload.talk.prompts import answer, prompt_ids, read_prompts
from offload.terminal import console, loading
from offload.terminal.exits import INTERRUPTED
from offload.terminal.flags import Json, Model

if TYPE_CHECKING:
    from offload.quality.gates import MeanInputs, Recall
    from offload.quality.sensitivity import ExpertOutputs, LayerSensitivity


def calibrate(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(metavar="FILE", help='Prompts to answer: a JSON object a line, its "prompt" is the text.'),
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", metavar="N", min=2, help="Only the first N prompts.")
    ] = None,
    depth: Annotated[int, typer.Option(metavar="D", min=1, help="Measure how well 1 to D layers ahead are known.")] = 3,
    tokens: Annotated[
        int,
        typer.Option(
            "--sensitivity",
            metavar="N",
            min=0,
            help="Measure on N tokens what dropping a layer's least expert costs. Takes as long as a prompt of "
            "N tokens for each layer; 0: do not.",
        ),
    ] = 256,
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
    """Measure by how much the inputs of neighbouring gates differ, what knowing it is worth, and which experts matter.

    Every second prompt is measured on. On the others, the experts that the next gates name are compared with those that
    are chosen in the end, with the average difference added and without. All prompts show which are super experts: the
    few with extreme outputs, which the whole model leans on. Some answers are read again, layer by layer without the
    least of each token's experts: what that costs says how sensitive a layer is, and what every expert is worth.
    """

    texts = read_prompts(prompts)[:limit]
    if len(texts) < 2:
        raise OffloadError(f"{prompts} has one prompt: give two or more, one to measure on and one to compare on")
    with loading.load_model(model, options) as loaded:
        from offload.layers.calibration import Calibration, gates_fingerprint
        from offload.talk.reply import seed_sampling

        ids = [prompt_ids(loaded, model, text) for text in texts]
        seed_sampling(sampling)
        try:
            seen = _measure(loaded, ids, sampling, depth, tokens)
        except KeyboardInterrupt:
            notice("stopped: nothing was stored")
            raise typer.Exit(INTERRUPTED) from None
        found = Calibration(
            gates_fingerprint(loaded.module, loaded.parts.experts),
            seen.means.offsets(),
            {"model": model, "workload": prompts.name, "tokens": str(seen.means.tokens)},
            maxima=seen.outputs.maxima,
            sensitivity=seen.least.weight if tokens else None,
            importance=seen.least.importance(seen.outputs, seen.read) if tokens else None,
        )
        path = output or calibration_path(found.fingerprint)
        found.write(path)
    figures = {
        "model": model,
        "workload": prompts.name,
        "tokens": seen.means.tokens,
        "file": str(path),
        "recall": seen.plain.share.tolist(),
        "recall_with_offsets": seen.moved.share.tolist(),
        "super_experts": [list(key) for key in sorted(found.super_experts)],
        "largest_outputs": seen.outputs.maxima.tolist(),
        "sensitivity_tokens": seen.least.tokens,
        "sensitivity": None if found.sensitivity is None else found.sensitivity.tolist(),
        "importance": None if found.importance is None else found.importance.tolist(),
    }
    if json_output:
        print(json.dumps(figures, ensure_ascii=False, allow_nan=False))
    else:
        console.answers().print(_table(figures))
        console.answers().print(_layers(figures))
    console.dim(f"stored in {path}: from {seen.means.tokens} tokens of {prompts.name}")


class _Seen(NamedTuple):
    """What watched a model, and how many tokens it read while all of its experts were watched."""

    means: MeanInputs
    plain: Recall
    moved: Recall
    outputs: ExpertOutputs
    least: LayerSensitivity
    read: int


def _measure(loaded: Any, ids: Sequence[list[int]], sampling: SamplingOptions, depth: int, tokens: int) -> _Seen:
    """Answers the prompts `ids`, and reads `tokens` tokens of it again. Raises KeyboardInterrupt on Ctrl-C."""
    from offload.quality.gates import MeanInputs, Recall, attached
    from offload.quality.sensitivity import ExpertOutputs, LayerSensitivity
    from offload.talk.reply import Interrupt

    inner, experts = loaded.module, loaded.parts.experts
    with Interrupt() as interrupt:
        with progress_bar("running prompts", len(ids)) as bar:

            def run(prompts: Sequence[list[int]]) -> Iterator[list[int]]:
                for prompt in prompts:
                    yield answer(loaded, prompt, sampling, interrupt)
                    bar.advance()

            outputs = ExpertOutputs(inner, loaded.parts.runtime, experts)
            with attached(outputs):
                means = MeanInputs(inner, experts)
                with attached(means):
                    answers = list(run(ids[::2]))
                plain, moved = Recall(inner, experts, depth), Recall(inner, experts, depth, means.offsets())
                with attached(plain, moved):
                    answers += run(ids[1::2])
        with progress_bar("dropping experts", min(tokens, sum(map(len, answers)))) as bar:

            def done(read: int) -> None:
                bar.advance(read)
                if interrupt.requested:
                    raise KeyboardInterrupt

            least = LayerSensitivity(len(experts.layers))
            least.measure(loaded, answers, tokens, done)
    # The last token of each answer was not read.
    return _Seen(means, plain, moved, outputs, least, sum(map(len, answers)) - len(answers))


def _table(figures: dict[str, Any]) -> Table:
    table = Table("layers ahead", box=None, header_style="dim")
    for column in ("of the first K", "with offsets", "of all 2K", "with offsets"):
        table.add_column(column, justify="right")
    for distance, (plain, moved) in enumerate(zip(figures["recall"], figures["recall_with_offsets"], strict=True), 1):
        shares = (plain[0], moved[0], plain[1], moved[1])
        table.add_row(str(distance), *(f"{share:.1%}" for share in shares))
    return table


def _layers(figures: dict[str, Any]) -> Table:
    table = Table("layer", box=None, header_style="dim")
    for column in ("sensitivity", "largest output", "super experts"):
        table.add_column(column, justify="right")
    for layer, outputs in enumerate(figures["largest_outputs"]):
        sensitivity = "-" if figures["sensitivity"] is None else f"{figures['sensitivity'][layer]:.3g}"
        super_experts = [str(expert) for at, expert in figures["super_experts"] if at == layer]
        table.add_row(str(layer), sensitivity, f"{max(outputs):.3g}", ", ".join(super_experts))
    return table
