"""`offload chat`, `generate`, `plan` and `demo`: what most people come for."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from cache.errors import ModelError, OffloadError
from offload.options import LoadOptions, PlanOptions, SamplingOptions
from offload.system.messages import notice, warning
from offload.terminal import console, loading
from offload.terminal.exits import INTERRUPTED
from offload.terminal.flags import Json, Machine, Model, PromptTokens, RouteTrace, readable
from offload.terminal.tables import plan_table, report, show, speeds_table

_PLAIN_TOKENS = 256  # how far `generate` goes where neither a flag nor the model sets a limit

OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Folder of a checkpoint, or its id or address on the hub. Default: a small demo model."
    ),
]


class Demo(str, Enum):
    """What `offload demo` may be asked for."""

    MODEL = "model"
    MIXTURE = "mixture"
    TRACE = "trace"


FullStats = Annotated[bool, typer.Option("--stats", help="Show every counter after a reply, not one line.")]


def chat(
    model: OptionalModel = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Answer this once and leave. Piped text is appended to it.", callback=readable
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.", callback=readable)] = None,
    show_thinking: Annotated[
        bool, typer.Option("--show-thinking", help="Show what the model thinks before it answers, on standard error.")
    ] = False,
    json_output: Json = False,
    stats: FullStats = False,
    *,
    sampling: SamplingOptions,
    options: LoadOptions,
) -> None:
    """Chat with a model through its own chat template.

    At a terminal it is a conversation; type /help there.

    With --prompt or piped text it answers once: the reply on standard output, statistics on standard error.
    """
    text = _once(prompt)
    if text is None and json_output:
        raise OffloadError("--json answers once: give --prompt TEXT or pipe the text in")
    path, name = _chosen(model)
    with loading.load_model(path, options) as loaded:
        from offload.terminal.chat import Chat, Repl

        talk = Chat(loaded, name, sampling, system, show_thinking)
        if text is None:
            Repl(talk, full_stats=stats).run()
        else:
            _answer(lambda interrupt, write: talk.ask(text, interrupt, write), json_output, stats)


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to continue.", callback=readable)] = None,
    prompt_ids: Annotated[
        str | None,
        typer.Option(metavar="1,2,3", help="Token ids to continue, for a checkpoint without a tokenizer."),
    ] = None,
    json_output: Json = False,
    stats: FullStats = False,
    *,
    sampling: SamplingOptions,
    options: LoadOptions,
) -> None:
    """Continue a prompt, as plain completion.

    The continuation (ids without a tokenizer) goes to standard output, statistics to standard error.

    Without --prompt and --prompt-ids, the prompt is read from a pipe.
    """
    ids = None if prompt_ids is None else _parse_ids(prompt_ids)
    if prompt is None and ids is None:
        prompt = console.piped_text()
    if (prompt is None) == (ids is None):
        raise OffloadError("give one prompt: --prompt TEXT, --prompt-ids 1,2,3, or text piped in")
    with loading.load_model(model, options) as loaded:
        from offload.talk.reply import reply_limit, seed_sampling, stream_reply

        if ids is None:
            ids = _tokens(loaded, model, prompt or "")
        seed_sampling(sampling)
        limit = reply_limit(loaded, len(ids), sampling, default=_PLAIN_TOKENS)
        _answer(
            lambda interrupt, write: stream_reply(loaded, ids, sampling, limit, interrupt, write),
            json_output,
            stats,
        )


def plan(
    model: Model,
    prompt_tokens: PromptTokens = 64,
    trace: RouteTrace = None,
    machine: Machine = None,
    profile: Annotated[Path | None, typer.Option(hidden=True)] = None,
    json_output: Json = False,
    *,
    options: PlanOptions,
) -> None:
    """Show what would go where, without loading a weight, and how fast that would be.

    Reads the configuration and the headers of the checkpoint's files; nothing else is fetched from the hub. Speeds
    are predicted from the machine's profile and a typical model's locality. With --trace they are those of a run that
    follows a recorded trace, by the default policy or the parts of --preset.
    """
    if profile is not None:
        notice("--profile is --machine now")
    with console.waiting("reading headers"):
        from cache.traces.trace import Trace
        from offload.plan.prepare import plan_and_parts
        from offload.simulation.forecast import forecast, predicted_beside, rules_to_replay

        measured = loading.find_profile(machine or profile)
        routed = None if trace is None else Trace.open(trace)
        placed, chosen = plan_and_parts(model, options)
        rules, uncounted = rules_to_replay(chosen, routed)
        predicted, unpredicted = forecast(placed, measured, prompt_tokens=prompt_tokens, trace=routed, rules=rules)
    for note in placed.notes:
        warning(note)
    if options.preset is not None and uncounted is not None and unpredicted is None:
        notice(f"--preset {options.preset}: {uncounted}")
    if unpredicted is not None:
        notice(f"no prediction of speeds: {unpredicted}")
    if json_output:
        console.print_json({**placed.as_dict(), **predicted_beside(predicted, None), "unpredicted": unpredicted})
    else:
        title = f"{placed.model} on {placed.device} in {placed.dtype}"
        console.answers().print(title, soft_wrap=True)
        console.answers().print(plan_table(placed))
        show([speeds_table(predicted, None)], measured)


def demo(
    what: Annotated[
        Demo,
        typer.Argument(
            metavar="[WHAT]",
            help="model: a chat model carved into experts. mixture: a small one trained as a Mixture of Experts. "
            "trace: a recording of the mixture's routing.",
        ),
    ] = Demo.MODEL,
) -> None:
    """Print where the demo model is, or the mixture, or the mixture's trace; models are built on first use."""
    from offload.demo.mixture import TRACE, mixture_path

    if what is Demo.MODEL:
        print(_demo())
    else:
        print(TRACE if what is Demo.TRACE else mixture_path(progress=sys.stderr.isatty()))


def _demo() -> Path:
    from offload.demo.build import demo_path

    return demo_path(progress=sys.stderr.isatty())


def _chosen(model: str | None) -> tuple[str | Path, str]:
    """What to load and what to call it."""
    return (_demo(), "demo") if model is None else (model, model)


def _once(prompt: str | None) -> str | None:
    """The text to answer once, from the flag and the pipe; None for a conversation at the console."""
    piped = console.piped_text()
    if prompt is None and piped is None:
        return None
    text = "\n\n".join(part.strip() for part in (prompt, piped) if part and part.strip())
    if not text:
        raise OffloadError("the prompt is empty: give --prompt TEXT, pipe text in, or start at a terminal to chat")
    return text


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OffloadError(f'--prompt-ids: cannot read "{text}" as token ids: write them like 1,2,3') from None


def _tokens(model: Any, name: str, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ModelError(f"{name} has no tokenizer: give token ids with --prompt-ids 1,2,3")
    return list(model.tokenizer(text)["input_ids"])


def _answer(ask: Any, as_json: bool, full_stats: bool) -> None:
    """Runs `ask(interrupt, write)` and prints what it says; leaves with code 130 if Ctrl-C cut it short."""
    from offload.talk.reply import Interrupt

    answer = console.Answer(silent=as_json)
    with Interrupt() as interrupt, answer:
        reply = ask(interrupt, answer.write)
    if as_json:
        console.print_json(reply.as_dict())
    if full_stats or not as_json:
        report(reply, full_stats)
    if reply.finish == "interrupted":
        raise typer.Exit(INTERRUPTED)
