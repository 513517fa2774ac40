"""`offload calibrate`: how gates' inputs change from layer to layer and what experts matter, measured and stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table

from cache.errors import OffloadError
from cache.outputs import check_output
from offload.options import LoadOptions, SamplingOptions
from offload.system.messages import notice
from offload.system.paths import calibration_path, own_place
from offload.system.progress import progress_bar
from offload.talk.prompts import answer, prompt_ids, read_prompts
from offload.terminal import console, loading
from offload.terminal.exits import INTERRUPTED
from offload.terminal.flags import MOST_LAYERS, Json, Model, PromptFile

if TYPE_CHECKING:
    from offload.layers.calibration import Calibration
    from offload.quality.gates import MeanInputs, Recall
    from offload.quality.sensitivity import ExpertOutputs, LayerSensitivity


Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="File to store it in. Default: in offload's cache folder, where it is found.",
    ),
]
Depth = Annotated[
    int,
    typer.Option(
        hidden=True, metavar="D", min=1, max=MOST_LAYERS, help="Measure how well 1 to D layers ahead are known."
    ),
]
Sensitivity = Annotated[
    int,
    typer.Option(
        "--sensitivity",
        metavar="N",
        min=0,
        help="Tokens to measure on what it costs to drop a layer's least expert; 0 leaves it out. It takes as long as "
        "two prompts of N tokens for each layer.",
    ),
]


def calibrate(
    model: Model,
    prompts: PromptFile,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", metavar="N", min=2, help="Only the first N prompts.")
    ] = None,
    depth: Depth = 3,
    tokens: Sensitivity = 256,
    output: Output = None,
    json_output: Json = False,
    *,
    sampling: SamplingOptions,
    options: LoadOptions,
) -> None:
    """Measure how the gates' inputs change from layer to layer, and which experts matter.

    Half of the prompts are measured on. On the other half, the experts that the next gates name are compared with
    those that are chosen, with the measured offsets and without. All prompts show the super experts: the few with
    extreme outputs, on which the whole model depends. Some answers are read again, and one layer after the other
    drops each token's least expert: once the others take over its weight, once they do not. What that costs says how
    sensitive the layer is, and what each expert is worth.
    """

    texts = read_prompts(prompts)[:limit]
    if len(texts) < 2:
        raise OffloadError(f"{prompts} has one prompt: give two or more, one to measure on and one to compare on")
    check_output(output or own_place(calibration_path("any")))
    with loading.load_model(model, options) as loaded:
        from offload.layers.calibration import gates_fingerprint
        from offload.talk.reply import seed_sampling

        ids = [prompt_ids(loaded, model, text) for text in texts]
        seed_sampling(sampling)
        try:
            seen = _measure(loaded, ids, sampling, depth, tokens)
        except KeyboardInterrupt:
            notice("stopped: nothing was stored")
            raise typer.Exit(INTERRUPTED) from None
        found = seen.calibration(gates_fingerprint(loaded.module, loaded.parts.experts), model, prompts.name)
        path = output or own_place(calibration_path(found.fingerprint))
        found.write(path)
    figures = seen.figures(found, path)
    if json_output:
        console.print_json(figures)
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
    unscaled: LayerSensitivity
    read: int

    def calibration(self, fingerprint: str, model: str, workload: str) -> Calibration:
        """What is stored of it."""
        from offload.layers.calibration import Calibration

        return Calibration(
            fingerprint,
            self.means.offsets(),
            {"model": model, "workload": workload, "tokens": str(self.means.tokens)},
            maxima=self.outputs.maxima,
            sensitivity=self.least.weight if self.least.tokens else None,
            importance=self.least.importance(self.outputs, self.read) if self.least.tokens else None,
            unscaled_sensitivity=self.unscaled.weight if self.unscaled.tokens else None,
        )

    def figures(self, found: Calibration, path: Path) -> dict[str, Any]:
        """What is printed of it, as plain JSON types; `found` is what was stored in `path`."""
        return {
            "model": found.metadata["model"],
            "workload": found.metadata["workload"],
            "tokens": self.means.tokens,
            "file": str(path),
            "recall": self.plain.share.tolist(),
            "recall_with_offsets": self.moved.share.tolist(),
            "super_experts": [list(key) for key in sorted(found.super_experts)],
            "largest_outputs": self.outputs.maxima.tolist(),
            "sensitivity_tokens": self.least.tokens,
            "sensitivity": None if found.sensitivity is None else found.sensitivity.tolist(),
            "unscaled_sensitivity": None if found.unscaled_sensitivity is None else found.unscaled_sensitivity.tolist(),
            "importance": None if found.importance is None else found.importance.tolist(),
        }


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
        with progress_bar("dropping experts", 2 * min(tokens, sum(map(len, answers)))) as bar:

            def done(read: int) -> None:
                bar.advance(read)
                if interrupt.requested:
                    raise KeyboardInterrupt

            least, unscaled = (LayerSensitivity(len(experts.layers), renormalise=each) for each in (True, False))
            for measured in (least, unscaled):
                measured.measure(loaded, answers, tokens, done)
    # The last token of each answer was not read.
    return _Seen(means, plain, moved, outputs, least, unscaled, sum(map(len, answers)) - len(answers))


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
