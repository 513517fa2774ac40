"""Every flag that commands share: one for each field of `offload.options`, and those that several commands have.

So a flag cannot mean two things in two commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

_MEMORY = "Memory"
_MACHINE = "Machine"
_PRECISION = "Precision"
_PRESET = "A published system as a whole"
_MODEL = "Where the model comes from"
_REPLY = "Text generation"


@dataclass
class State:
    """What one run of the program remembers across commands; typer carries it as the context's `obj`."""

    debug: bool = False


def _remember_debug(context: typer.Context, value: bool) -> bool:
    context.find_root().ensure_object(State).debug |= value
    return value


def readable(text: str | None) -> str | None:
    """`text` from the command line, with bytes that are no UTF-8 replaced as a tokenizer needs."""
    return text and text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error, not one line.", callback=_remember_debug),
]
LateDebug = Annotated[bool, typer.Option("--debug", hidden=True, callback=_remember_debug)]
"""The same after a command's name."""
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or its id on the hub.")]
PromptFile = Annotated[
    Path, typer.Option(metavar="FILE", help='Prompts to answer: a JSON object a line, its "prompt" is the text.')
]
PromptTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the prompt.")]
RouteTrace = Annotated[
    Path | None,
    typer.Option(
        metavar="TRACE", help="A recorded trace to go by, instead of the model's own routers or a typical locality."
    ),
]
Machine = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What `offload profile` measured. Default: what it stored, if it did."),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]

FLAGS: Mapping[str, Any] = {
    "gpu_mem": typer.Option(
        metavar="SIZE",
        help="Most accelerator memory to use: 8G and 8GiB are binary, 7.5GB is decimal. Default: from what is free.",
        rich_help_panel=_MEMORY,
    ),
    "cpu_mem": typer.Option(
        metavar="SIZE",
        help="Most RAM for the whole process, its peak included. Default: from what is free.",
        rich_help_panel=_MEMORY,
    ),
    "expert_cache": typer.Option(
        metavar="SIZE",
        help="Cap on the fastest tier's expert cache, inside its budget. Default: all that is left.",
        rich_help_panel=_MEMORY,
    ),
    "context": typer.Option(
        metavar="TOKENS",
        min=1,
        help="Tokens the KV cache holds: prompt, history and reply together.",
        rich_help_panel=_MEMORY,
    ),
    "scheduler": typer.Option(
        metavar="NAME",
        help="Who computes an expert that the accelerator lacks: gpu-only (the default: it is fetched), cpu-only "
        "(the CPU), or a rule that splits each layer: auto, hybrimoe, dali, ratio (docs/scheduling.md).",
        rich_help_panel=_MEMORY,
    ),
    "policy": typer.Option(
        metavar="NAME",
        help="Which expert leaves a full cache: lru, lfru (the default), mrs, ... (docs/policies.md), or module:Class.",
        rich_help_panel=_MEMORY,
    ),
    "pool": typer.Option(
        metavar="POOL",
        help="global: one expert cache for all layers (the default); layer: one for each.",
        rich_help_panel=_MEMORY,
    ),
    "predictor": typer.Option(
        metavar="NAME",
        help="Says which experts come next, to fetch them ahead: auto (the default: cross-layer-gate, where "
        "anything is fetched and it pays), none, ensemble, ... (docs/predictors.md), or module:Class.",
        rich_help_panel=_MEMORY,
    ),
    "prefetch_depth": typer.Option(
        metavar="D",
        min=1,
        help="How many layers ahead to fetch. Default: 2.",
        rich_help_panel=_MEMORY,
    ),
    "profile": typer.Option(
        metavar="TRACE",
        help="The recorded trace that a policy, and a predictor, which learns is trained on.",
        rich_help_panel=_MEMORY,
    ),
    "prefill": typer.Option(
        metavar="WAY",
        help="How prompts are read: streamed (their most frequent experts are kept, the next layer's fetched while "
        "one computes), kept (only that), on-demand (neither), or auto: streamed, on-demand where a --fallback "
        "chooses (docs/prefill.md).",
        rich_help_panel=_MEMORY,
    ),
    "device": typer.Option(
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N, or emulated: an accelerator played by host memory.",
        rich_help_panel=_MACHINE,
    ),
    "dtype": typer.Option(
        metavar="DTYPE",
        help="auto (the checkpoint's own), float32, bfloat16 or float16.",
        rich_help_panel=_MACHINE,
    ),
    "link": typer.Option(
        metavar="SPEED",
        help='Link speed of the emulated device, such as "3GB/s".',
        rich_help_panel=_MACHINE,
    ),
    "threads": typer.Option(
        metavar="N",
        min=1,
        help="CPU threads that compute. Default: one a core; one alone where experts are small or the device is "
        "emulated.",
        rich_help_panel=_MACHINE,
    ),
    "preset": typer.Option(
        metavar="NAME",
        help="Policy, pool, predictor, precisions, fallback and scheduler of a published system, where no flag "
        "says otherwise: hybrimoe, hobbit, fate, ... (docs/presets.md), or auto: what `offload tune` found best.",
        rich_help_panel=_PRESET,
    ),
    "experts": typer.Option(
        metavar="PRECISION",
        help="What experts are stored and computed at: auto (as the checkpoint has them, the default), bf16, int8, "
        'nf4, int4, int2; with a --fallback several, the best first: "auto,nf4" or "int8>int4". Converted on first '
        "use.",
        rich_help_panel=_PRECISION,
    ),
    "fallback": typer.Option(
        metavar="NAME",
        help="Which precision serves an expert that is not there: none (wait for the best, the default), hobbit, "
        "adapmoe, edgemoe, resident-low, deadline (docs/precision.md), or module:Class. All but none are lossy. At "
        "a single precision: buddy and cache-prior, which have tokens computed by other experts, that are there.",
        rich_help_panel=_PRECISION,
    ),
    "expert_store": typer.Option(
        metavar="DIR",
        help="Where converted experts are. Default: offload's cache folder.",
        rich_help_panel=_PRECISION,
    ),
    "dense": typer.Option(
        metavar="PRECISION",
        help="What linear layers that belong to no expert are stored and computed at, routers and gates excepted: "
        "auto (as they are), bf16, int8 or nf4. Converted while loading; lossy.",
        rich_help_panel=_PRECISION,
    ),
    "revision": typer.Option(metavar="REF", help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL),
    "trust_remote_code": typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. Only for authors you trust.",
        rich_help_panel=_MODEL,
    ),
    "local_files_only": typer.Option(
        "--local-files-only", help="Use what is on disk; never the network.", rich_help_panel=_MODEL
    ),
    "max_new_tokens": typer.Option(
        metavar="N",
        min=1,
        help="Longest reply in tokens. Default: the model's own limit; else chat fills the context and generate stops "
        "at 256.",
        rich_help_panel=_REPLY,
    ),
    "temperature": typer.Option(
        metavar="T",
        min=0.0,
        help="0 always takes the likeliest token; higher is more varied. Default: the model's own.",
        rich_help_panel=_REPLY,
    ),
    "top_p": typer.Option(
        metavar="P",
        min=0.0,
        max=1.0,
        help="Sample among the likeliest tokens that make up this probability. Default: the model's own.",
        rich_help_panel=_REPLY,
    ),
    "seed": typer.Option(
        metavar="N", min=0, max=2**32 - 1, help="Makes sampling reproducible.", rich_help_panel=_REPLY
    ),
}
"""The flag of each field of the options, by the field's name, in the order that the help has."""

BASIC = frozenset({"gpu_mem", "cpu_mem", "context", "device", "preset", "experts", "max_new_tokens", "temperature"})
"""Those that most people need: where a command has many, `--help` shows these and the command's own."""
