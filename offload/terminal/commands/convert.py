"""`offload convert`: a checkpoint's experts in other formats, written once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from offload.options import ModelOptions, PlanOptions
from offload.system.sizes import format_bytes
from offload.terminal import console
from offload.terminal.flags import Json, Model


def convert(
    model: Model,
    experts: Annotated[
        str,
        typer.Option(
            metavar="PRECISIONS", help="bf16, int8, nf4, int8>int4>int3>int2, or several with commas between them."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder to store them in; name it as --expert-store afterwards. Default: offload's cache folder, "
            "where they are found.",
        ),
    ] = None,
    json_output: Json = False,
    *,
    options: ModelOptions,
) -> None:
    """Store a model's experts in other formats. On first use this happens by itself.

    A stopped conversion goes on where it was. Every record has a checksum, which is checked when the record is
    first read.
    """
    with console.waiting("starting"):
        from offload.plan.conversion import convert_model

    wanted = PlanOptions(experts=experts, expert_store=output, **vars(options))
    done = convert_model(model, wanted, progress=sys.stderr.isatty())
    if json_output:
        console.print_json(
            {"folder": str(done.folder), "bytes": done.nbytes, "checkpoint_bytes": done.checkpoint_bytes}
        )
        return
    for name, nbytes in done.nbytes.items():
        console.answers().print(
            f"{name}: {format_bytes(nbytes)} of {format_bytes(done.checkpoint_bytes)} in the checkpoint"
        )
    console.answers().print(f"in {done.folder}")
