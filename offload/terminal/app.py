"""The commands of the terminal: what each flag does, and what is printed where."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

import offload
from cache.errors import ModelError, OffloadError
from offload.options import (
    Json,
    LoadOptions,
    PlanOptions,
    Profile,
    PromptTokens,
    RouteTrace,
    SamplingOptions,
    State,
    flat,
    readable,
)
from offload.terminal import console as terminal
from offload.terminal.commands.bench import bench_command
from offload.terminal.commands.calibrate import calibrate
from offload.terminal.commands.convert import convert
from offload.terminal.commands.eval import evaluate
from offload.terminal.commands.predict import predict
from offload.terminal.commands.profile import profile
from offload.terminal.commands.replay import replay
from offload.terminal.commands.trace import trace_app
from offload.terminal.commands.train import train_predictor
from offload.terminal.commands.tune import tune_command
from offload.terminal.main import INTERRUPTED
from offload.terminal.tables import find_profile, speeds_table

_PLAIN_TOKENS = 256  # how far `generate` goes where neither a flag nor the model sets a limit

app = typer.Typer(
    name="offload",
    help="Run Mixture-of-Experts language models too big for your GPU, exactly, inside a memory budget.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(trace_app, name="trace")
app.command()(flat(replay))
app.command()(flat(predict))
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or its id on the hub.")]
OptionalModel = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or its id on the hub. Default: a small demo model."),
]
FullStats = Annotated[bool, typer.Option("--stats", help="Show every counter after a reply, not one line.")]


def load_model(model: str | Path, options: LoadOptions) -> Any:
    """Loads a model for `chat` and `generate`, with progress on a terminal. Raises OffloadError."""
    with terminal.waiting("starting"):
        from offload.model import OffloadedModel

    return OffloadedModel.from_pretrained(model, **asdict(options), progress=sys.stderr.isatty())


@app.callback(invoke_without_command=True)
@flat
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"offload {offload.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@flat
def chat(
    model: OptionalModel = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Answer this once and leave. Piped text is appended to it.", callback=readable
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.", callback=readable)] = None,
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
    with load_model(path, options) as loaded:
        from offload.terminal.chat import Chat, Repl

        talk = Chat(loaded, name, sampling, system)
        if text is None:
            Repl(talk, full_stats=stats).run()
        else:
            _answer(lambda interrupt, write: talk.ask(text, interrupt, write), json_output, stats)


@app.command()
@flat
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to continue.", callback=readable)] = None,
    prompt_ids: Annotated[
        str | None,
        typer.Option(metavar="1,2,3", help="Token ids to continue: works for a checkpoint without a tokenizer."),
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
        prompt = terminal.piped_text()
    if (prompt is None) == (ids is None):
        raise OffloadError("give one prompt: --prompt TEXT, --prompt-ids 1,2,3, or text piped in")
    with load_model(model, options) as loaded:
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


@app.command()
@flat
def plan(
    model: Model,
    prompt_tokens: PromptTokens = 64,
    trace: RouteTrace = None,
    profile: Profile = None,
    json_output: Json = False,
    *,
    options: PlanOptions,
) -> None:
    """Show what would go where, without loading a weight, and how fast that would be on this machine.

    Reads the configuration and the headers of the checkpoint's files; from the hub nothing else is fetched. Speeds are
    those of the default policy, by the machine's profile, and by a recorded trace or a typical model's locality.
    """
    with terminal.waiting("reading headers"):
        from cache.traces.trace import Trace
        from offload.plan.budgets import make_plan
        from offload.simulation.forecast import forecast, predicted_beside

        measured = find_profile(profile)
        routed = None if trace is None else Trace.open(trace)
        placed = make_plan(model, **asdict(options))
        predicted, unpredicted = forecast(placed, measured, prompt_tokens=prompt_tokens, trace=routed)
    for note in placed.notes:
        terminal.warning(note)
    if unpredicted is not None:
        terminal.notice(f"no prediction of speeds: {unpredicted}")
    if json_output:
        print(json.dumps({**placed.as_dict(), **predicted_beside(predicted, None), "unpredicted": unpredicted}))
    else:
        title = f"{placed.model} on {placed.device} in {placed.dtype}"
        terminal.answers().print(title, soft_wrap=True, markup=False, highlight=False)
        terminal.answers().print(terminal.plan_table(placed))
        terminal.answers().print(speeds_table(predicted, None))


@app.command()
@flat
def demo() -> None:
    """Print the folder of the demo model, building it on first use."""
    print(_demo())


app.command("bench")(bench_command)
app.command("tune")(tune_command)
app.command("eval")(evaluate)
app.command()(profile)
app.command()(calibrate)
app.command()(convert)
app.command("train-predictor")(train_predictor)


def _demo() -> Path:
    from offload.demo.build import demo_path

    return demo_path(progress=sys.stderr.isatty())


def _chosen(model: str | None) -> tuple[str | Path, str]:
    """What to load and what to call it."""
    return (_demo(), "demo") if model is None else (model, model)


def _once(prompt: str | None) -> str | None:
    """The text to answer once, from the flag and the pipe; None for a conversation at the terminal."""
    piped = terminal.piped_text()
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

    answer = terminal.Answer(silent=as_json)
    with Interrupt() as interrupt, answer:
        reply = ask(interrupt, answer.write)
    if as_json:
        print(json.dumps(reply.as_dict(), ensure_ascii=False, allow_nan=False))
    if full_stats or not as_json:
        terminal.report(reply, full_stats)
    if reply.finish == "interrupted":
        raise typer.Exit(INTERRUPTED)


def run(arguments: Sequence[str], state: State) -> int:
    """Runs a command line and gives its exit code. Raises OffloadError for a mistake in it, and what commands raise."""
    command = get_command(app)
    try:
        with command.make_context("offload", list(arguments), obj=state) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return int(leave.exit_code)
    except typer.TyperException as error:
        where = getattr(error, "ctx", None)
        raise OffloadError(error.format_message() + (f" (see {where.command_path} --help)" if where else "")) from error
    finally:
        sys.stdout.flush()
    return 0
