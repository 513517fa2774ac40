"""`offload eval`: what configurations cost in quality, as a table."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cache.errors import OffloadError
from offload.options import LoadOptions
from offload.system.messages import notice
from offload.system.sizes import format_bytes
from offload.talk.prompts import read_prompts
from offload.terminal import console
from offload.terminal.exits import INTERRUPTED
from offload.terminal.flags import Json, Model

if TYPE_CHECKING:
    from offload.quality.evaluate import Evaluation

_CONFIGURATION = "What is compared: give each as often as you like, all combinations run"


Texts = Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="A plain text. May be repeated.")]
Prompts = Annotated[
    list[Path] | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='Prompts: a JSON object a line, with the text as its "prompt". May be repeated.',
    ),
]
Experts = Annotated[
    list[str] | None,
    typer.Option(
        "--experts",
        metavar="FORMATS",
        help='Precision of the experts: "nf4", or several, the best first: "auto,nf4" or "int8>int4". Default: '
        "auto, the checkpoint's own.",
        rich_help_panel=_CONFIGURATION,
    ),
]
Fallbacks = Annotated[
    list[str] | None,
    typer.Option(
        "--fallback",
        metavar="RULE",
        help="Which of several precisions serves a miss. A single precision runs without. Default: none.",
        rich_help_panel=_CONFIGURATION,
    ),
]
ExpertCaches = Annotated[
    list[str] | None,
    typer.Option(
        "--expert-cache",
        metavar="SIZE",
        help="Most memory for the expert cache: a size, or a share of all experts, such as 25%. Default: all that is "
        "left.",
        rich_help_panel=_CONFIGURATION,
    ),
]


def evaluate(
    model: Model,
    text: Texts = None,
    prompts: Prompts = None,
    experts: Experts = None,
    fallback: Fallbacks = None,
    expert_cache: ExpertCaches = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Judge by the first N tokens of each text.")] = 2048,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode", help="Read token by token, as generating does. Configurations with a fallback always do."
        ),
    ] = False,
    json_output: Json = False,
    *,
    options: LoadOptions,
) -> None:
    """Measure what stored formats, fallbacks and cache sizes cost in quality.

    Prints perplexity, the mean KL divergence from the model at full precision, and how often both find the same
    token likeliest. The model at full precision runs first, within the same budgets, and leaves its logits on disk.
    Then each configuration runs alone. Texts are read in windows as long as the context. --json prints a list with
    an object for each text and configuration (docs/evaluation.md).
    """
    texts = _read(text or [], prompts or [])
    configurations = list(_combinations(experts, fallback, expert_cache))
    shared = {
        name: value for name, value in asdict(options).items() if name not in ("experts", "fallback", "expert_cache")
    }
    with console.waiting("starting"):
        from offload.quality.evaluate import evaluate as run
    rows: list[Evaluation] = []
    try:
        # What came before an interrupt stays in the list.
        rows.extend(
            run(model, texts, configurations, tokens=tokens, decode=decode, progress=sys.stderr.isatty(), **shared)
        )
    except KeyboardInterrupt:
        notice(f"stopped: {len(rows)} of {len(texts) * len(configurations)} rows were measured")
    if json_output:
        console.print_json([row.as_dict() for row in rows])
    elif rows:
        console.answers().print(_table(rows))
    if len(rows) < len(texts) * len(configurations):
        raise typer.Exit(INTERRUPTED)


def _read(texts: Sequence[Path], prompts: Sequence[Path]) -> dict[str, str | list[str]]:
    """What to judge by, by the files' names. Raises OffloadError and OSError."""
    if not texts and not prompts:
        raise OffloadError("there is nothing to judge by: give --text FILE or --prompts FILE")
    found: dict[str, str | list[str]] = {}
    for path in (*texts, *prompts):
        name = path.name if path.name not in found else str(path)
        found[name] = path.read_text(encoding="utf-8", errors="replace") if path in texts else read_prompts(path)
    return found


def _combinations(
    experts: Sequence[str] | None, fallback: Sequence[str] | None, expert_cache: Sequence[str] | None
) -> Iterator[dict[str, str]]:
    """Every combination of what was given. A single precision has nothing to fall back to: beside others that have,
    it runs without."""
    nothing: list[str | None] = [None]
    several = [value for value in experts or () if "," in value or ">" in value]
    for value in dict.fromkeys(experts or nothing):
        rules = nothing if several and value not in several else list(dict.fromkeys(fallback or nothing))
        for rule, size in itertools.product(rules, dict.fromkeys(expert_cache or nothing)):
            given = {"experts": value, "fallback": rule, "expert_cache": size}
            yield {name: chosen for name, chosen in given.items() if chosen is not None}


def _table(rows: Sequence[Evaluation]) -> Table:
    table = Table("text", box=None, header_style="dim")
    names = list(dict.fromkeys(name for row in rows for name in row.configuration))
    for name in names:
        table.add_column(name.replace("_", " "))
    for column in (
        "perplexity",
        "reference",
        "KL",
        "same top 1",
        "precision",
        "hit rate",
        "read",
        "over link",
        "tok/s",
        "RAM",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.text,
            *(str(row.configuration.get(name, "")) for name in names),
            f"{row.perplexity:.3f}",
            f"{row.reference_perplexity:.3f}",
            f"{row.kl:.5f}",
            f"{row.top1_agreement:.2%}",
            ", ".join(f"{share:.0%} {name}" for name, share in row.precision_shares.items()),
            f"{row.hit_rate:.0%}",
            format_bytes(row.bytes_from_disk),
            format_bytes(row.bytes_over_link),
            f"{row.tokens_per_s:.1f}",
            format_bytes(row.peak_rss_bytes),
        )
    return table
