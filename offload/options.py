"""Every flag of the terminal, declared once.

A group of flags is a dataclass whose fields are typer options; a command takes the group as one parameter and
`flat` spreads it out for typer. So a flag cannot mean two things in two commands.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from cache.errors import OffloadError

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
PromptTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the prompt.")]
RouteTrace = Annotated[
    Path | None,
    typer.Option(
        metavar="TRACE", help="A recorded trace to go by, instead of the model's own routers or a typical locality."
    ),
]
Profile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What `offload profile` measured. Default: what it stored, if it did."),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What decides how many bytes of what go where: the keyword arguments of `make_plan`."""

    gpu_mem: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most accelerator memory to use: 8G and 8GiB are binary, 7.5GB is decimal. "
            "Default: from what is free.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    cpu_mem: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most RAM for the whole process, its peak included. Default: from what is free.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    expert_cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Cap on the fastest tier's expert cache, inside its budget. Default: all that is left.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            min=1,
            help="Tokens the KV cache holds: prompt, history and reply together.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="auto, cpu, cuda, cuda:N, or emulated: an accelerator played by host memory.",
            rich_help_panel=_MACHINE,
        ),
    ] = "auto"
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Policy, pool, predictor, precisions, fallback and scheduler of a published system, where no flag "
            "says otherwise: hybrimoe, hobbit, fate, ... (docs/presets.md), or auto: what `offload tune` found best.",
            rich_help_panel=_PRESET,
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Who computes an expert that the accelerator lacks: gpu-only (the default: it is fetched), cpu-only "
            "(the CPU), or a rule that splits each layer: auto, hybrimoe, dali, ratio (docs/scheduling.md).",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="What experts are stored and computed at: auto (as the checkpoint has them, the default), bf16, int8, "
            'nf4, int4, int2; with a --fallback several, the best first: "auto,nf4" or "int8>int4". Converted on first '
            "use.",
            rich_help_panel=_PRECISION,
        ),
    ] = None
    fallback: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Which precision serves an expert that is not there: none (wait for the best, the default), hobbit, "
            "adapmoe, edgemoe, resident-low, deadline (docs/precision.md), or module:Class. All but none are lossy. At "
            "a single precision: buddy and cache-prior, which have tokens computed by other experts, that are there.",
            rich_help_panel=_PRECISION,
        ),
    ] = None
    expert_store: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where converted experts are. Default: offload's cache folder.",
            rich_help_panel=_PRECISION,
        ),
    ] = None
    dense: Annotated[
        str,
        typer.Option(
            metavar="PRECISION",
            help="What linear layers that belong to no expert are stored and computed at, routers and gates excepted: "
            "auto (as they are), bf16, int8 or nf4. Converted while loading; lossy.",
            rich_help_panel=_PRECISION,
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="auto (the checkpoint's own), float32, bfloat16 or float16.",
            rich_help_panel=_MACHINE,
        ),
    ] = "auto"
    link: Annotated[
        str | None,
        typer.Option(
            metavar="SPEED",
            help='Link speed of the emulated device, such as "3GB/s".',
            rich_help_panel=_MACHINE,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run Python code that comes with the model. Only for authors you trust.",
            rich_help_panel=_MODEL,
        ),
    ] = False
    local_files_only: Annotated[
        bool,
        typer.Option("--local-files-only", help="Use what is on disk; never the network.", rich_help_panel=_MODEL),
    ] = False


@dataclass(frozen=True, kw_only=True)
class LoadOptions(PlanOptions):
    """What loading a model takes: the keyword arguments of `OffloadedModel.from_pretrained`."""

    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Which expert leaves a full cache: lru, lfru (the default), mrs, ... (docs/policies.md), or "
            "module:Class.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    policy_profile: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE",
            help="The recorded trace that a policy which learns is trained on.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="POOL",
            help="global: one expert cache for all layers (the default); layer: one for each.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    predictor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Says which experts come next, to fetch them ahead: auto (the default: cross-layer-gate, where "
            "anything is fetched and it pays), none, ensemble, ... (docs/predictors.md), or module:Class.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    predictor_profile: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE",
            help="The recorded trace that a predictor which learns is trained on.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    prefetch_depth: Annotated[
        int | None,
        typer.Option(
            metavar="D",
            min=1,
            help="How many layers ahead to fetch. Default: 2.",
            rich_help_panel=_MEMORY,
        ),
    ] = None
    prefill: Annotated[
        str,
        typer.Option(
            metavar="WAY",
            help="How prompts are read: streamed (their most frequent experts are kept, the next layer's fetched while "
            "one computes), kept (only that), on-demand (neither), or auto: streamed, on-demand where a --fallback "
            "chooses (docs/prefill.md).",
            rich_help_panel=_MEMORY,
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="CPU threads that compute. Default: one a core; one alone where experts are small or the device is "
            "emulated.",
            rich_help_panel=_MACHINE,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen and when to stop; what is None comes from the model's generation config.

    Raises OffloadError for a combination that contradicts itself.
    """

    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Longest reply in tokens. Default: the model's own limit; else chat fills the context and "
            "generate stops at 256.",
            rich_help_panel=_REPLY,
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            min=0.0,
            help="0 always takes the likeliest token; higher is more varied. Default: the model's own.",
            rich_help_panel=_REPLY,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            min=0.0,
            max=1.0,
            help="Sample among the likeliest tokens that make up this probability. Default: the model's own.",
            rich_help_panel=_REPLY,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, max=2**32 - 1, help="Makes sampling reproducible.", rich_help_panel=_REPLY),
    ] = None

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.top_p is not None:
            raise OffloadError("--top-p does nothing with --temperature 0: leave one of them out")


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with every dataclass parameter replaced by one typer option a field, and `--debug` added.

    A parameter of the command's own takes the place of a field with that name, which stays at its default.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation)
    }
    parameters = [p for name, p in signature.parameters.items() if name not in groups]
    own = {parameter.name for parameter in parameters}
    names = {name: [field.name for field in fields(group) if field.name not in own] for name, group in groups.items()}
    for name, group in groups.items():
        hints = get_type_hints(group, include_extras=True)
        parameters += [_option(field, hints[field], group.__dataclass_fields__[field].default) for field in names[name]]
    parameters.append(_option("debug", Debug, False))

    @functools.wraps(command)
    def wrapper(*, debug: bool, **values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field: values.pop(field) for field in names[name]})
        command(**values)

    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
