"""Every flag that commands share: one for each field of `offload.options`, and those that several commands have.

So a flag cannot mean two things in two commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

MOST_LAYERS = 1000
"""That anything can look ahead or back."""
MOST_REPEATS = 10_000
"""Of a measurement."""

_MEMORY = "Memory"
_DECISIONS = "Decisions"
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
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or its id or address on the hub.")]
PromptFile = Annotated[
    Path, typer.Option(metavar="FILE", help='Prompts to answer: a JSON object a line, with the text as its "prompt".')
]
PromptTokens = Annotated[int, typer.Option(metavar="N", min=1, max=10**7, help="Tokens of the prompt.")]
RouteTrace = Annotated[
    Path | None,
    typer.Option(
        metavar="TRACE", help="Recorded trace to route by, instead of the model's own routers or a typical locality."
    ),
]
Machine = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What `offload profile` measured, or a machine of docs/costs.md: rtx-4060-laptop. Default: what it stored "
        "last.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]

FLAGS: Mapping[str, Any] = {
    "gpu_mem": typer.Option(
        metavar="SIZE",
        help="Most accelerator memory to use, such as 8G (binary) or 7.5GB (decimal). Default: most of what is free.",
        rich_help_panel=_MEMORY,
    ),
    "cpu_mem": typer.Option(
        metavar="SIZE",
        help="Most RAM for the whole process, its peak included. Default: most of what is free.",
        rich_help_panel=_MEMORY,
    ),
    "expert_cache": typer.Option(
        metavar="SIZE",
        help="Most memory for the expert cache of the processor that computes, inside its budget. Default: all that "
        "is left.",
        rich_help_panel=_MEMORY,
    ),
    "context": typer.Option(
        metavar="TOKENS",
        min=1,
        help="Tokens that the KV cache has room for: prompt, history and reply together. Default: 4096, or the "
        "model's limit.",
        rich_help_panel=_MEMORY,
    ),
    "scheduler": typer.Option(
        metavar="NAME",
        help="Who computes an expert that the accelerator lacks. gpu-only, the default, fetches the expert. cpu-only "
        "leaves it to the CPU. auto, hybrimoe, dali, monde and ratio divide each layer between both "
        "(docs/scheduling.md).",
        rich_help_panel=_DECISIONS,
    ),
    "policy": typer.Option(
        metavar="NAME",
        help="Which expert leaves a full cache: lfru (the default), lru, mrs, ... (docs/policies.md), or module:Class.",
        rich_help_panel=_DECISIONS,
    ),
    "pool": typer.Option(
        metavar="POOL",
        help="global, the default, has one expert cache for all layers; layer has one for each layer.",
        rich_help_panel=_DECISIONS,
    ),
    "quota": typer.Option(
        metavar="NAME",
        help="How layers with a cache each divide the room: even (the default), shallow, dp, distinct or plec "
        "(docs/policies.md), or module:Class. It implies --pool layer.",
        rich_help_panel=_DECISIONS,
    ),
    "predictor": typer.Option(
        metavar="NAME",
        help="Which experts are fetched ahead: auto, none, ensemble, ... (docs/predictors.md), or module:Class. auto, "
        "the default, asks the next layers' gates, as long as that pays.",
        rich_help_panel=_DECISIONS,
    ),
    "prefetcher": typer.Option(
        metavar="NAME",
        help="Which of the expected experts are fetched, in which order: ours (the default), fate, hobbit, ... "
        "(docs/predictors.md), or module:Class.",
        rich_help_panel=_DECISIONS,
    ),
    "prefetch_depth": typer.Option(
        metavar="D",
        min=1,
        help="Number of layers to look ahead. Default: the prefetcher's own, 2 for most.",
        rich_help_panel=_DECISIONS,
    ),
    "profile": typer.Option(
        metavar="TRACE",
        help="Recorded trace that trains a policy, a quota or a predictor which learns.",
        rich_help_panel=_DECISIONS,
    ),
    "placement": typer.Option(
        metavar="NAME",
        help="Which experts are in memory before the first token: empty (the default); popular, those that the profile "
        "used most, or the model before; random; or module:Class.",
        rich_help_panel=_DECISIONS,
    ),
    "prefill": typer.Option(
        metavar="WAY",
        help="How prompts are read (docs/prefill.md). streamed keeps the prompt's most frequent experts, and fetches "
        "the next layer's ahead. kept only keeps them. on-demand does neither. auto is streamed, or on-demand "
        "with a --fallback.",
        rich_help_panel=_DECISIONS,
    ),
    "device": typer.Option(
        metavar="DEVICE",
        help="What computes: auto, cpu, cuda, cuda:N, or emulated, an accelerator made of host memory.",
        rich_help_panel=_MACHINE,
    ),
    "dtype": typer.Option(
        metavar="DTYPE",
        help="What it computes in: auto (the checkpoint's own), float32, bfloat16 or float16.",
        rich_help_panel=_MACHINE,
    ),
    "link": typer.Option(
        metavar="SPEED",
        help='Speed of the emulated accelerator\'s link, such as "3GB/s".',
        rich_help_panel=_MACHINE,
    ),
    "threads": typer.Option(
        metavar="N",
        min=1,
        help="Threads that compute on the CPU, at most one a core. Default: that, or a single one for small experts "
        "and beside the emulated accelerator.",
        rich_help_panel=_MACHINE,
    ),
    "preset": typer.Option(
        metavar="NAME",
        help="Run a published system, such as hybrimoe or hobbit (docs/presets.md), or auto, what `offload tune` "
        "found best. Other flags replace its parts.",
        rich_help_panel=_PRESET,
    ),
    "experts": typer.Option(
        metavar="PRECISION",
        help="Precision of the experts: auto (the default, the checkpoint's own), bf16, int8, nf4, int4, int3 or "
        'int2. With a --fallback several, the best first: "auto,nf4" or "int8>int4". They are converted once, on '
        "first use.",
        rich_help_panel=_PRECISION,
    ),
    "fallback": typer.Option(
        metavar="NAME",
        help="What serves an expert that is missing at its best precision (docs/precision.md). none, the default, "
        "waits for it. hobbit, adapmoe, edgemoe, resident-low, deadline, d2moe, fate and module:Class take lower "
        "precisions. buddy and cache-prior take one precision, and let other experts do the work; adapmoe(skip=True) "
        "and moe-spec take one, and drop experts of tokens. All but none are lossy.",
        rich_help_panel=_PRECISION,
    ),
    "expert_store": typer.Option(
        metavar="DIR",
        help="Folder of converted experts. Default: in offload's cache folder.",
        rich_help_panel=_PRECISION,
    ),
    "dense": typer.Option(
        metavar="PRECISION",
        help="Precision of the linear layers outside the experts, routers excepted: auto (as they are), bf16, int8 or "
        "nf4. They are converted while they are loaded. All but auto are lossy.",
        rich_help_panel=_PRECISION,
    ),
    "activations": typer.Option(
        metavar="PRECISION",
        help="int8: what products with NF4 matrices on the CPU take in is rounded to 8 bits, in blocks of 64. That is "
        "faster, and lossy. Default: auto, which rounds nothing.",
        rich_help_panel=_PRECISION,
    ),
    "revision": typer.Option(metavar="REF", help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL),
    "exact": typer.Option(
        "--exact/--no-exact",
        help="Whether the CPU computes with the bits of torch's own kernels. Without, plain products and attention are "
        "several times as fast in places, and round otherwise, no less exactly. Default: --exact where the CPU has "
        "bfloat16 instructions, --no-exact elsewhere.",
        rich_help_panel=_MODEL,
    ),
    "trust_remote_code": typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. Only for authors you trust.",
        rich_help_panel=_MODEL,
    ),
    "local_files_only": typer.Option(
        "--local-files-only", help="Use what is on disk, never the network.", rich_help_panel=_MODEL
    ),
    "max_new_tokens": typer.Option(
        metavar="N",
        min=1,
        help="Longest reply in tokens. Default: the model's own limit. Without one, chat fills the context and "
        "generate stops at 256 tokens.",
        rich_help_panel=_REPLY,
    ),
    "temperature": typer.Option(
        metavar="T",
        min=0.0,
        help="0 always takes the likeliest token; a higher value varies more. Default: the model's own.",
        rich_help_panel=_REPLY,
    ),
    "top_p": typer.Option(
        metavar="P",
        min=0.0,
        max=1.0,
        help="Sample among the likeliest tokens that together have this probability. Default: the model's own.",
        rich_help_panel=_REPLY,
    ),
    "seed": typer.Option(metavar="N", min=0, max=2**32 - 1, help="Make sampling reproducible.", rich_help_panel=_REPLY),
}
"""The flag of each field of the options, by the field's name, in the order that the help has."""

BASIC = frozenset({"gpu_mem", "cpu_mem", "context", "device", "preset", "experts", "max_new_tokens", "temperature"})
"""Those that most people need: where a command has many, `--help` shows these and the command's own."""
