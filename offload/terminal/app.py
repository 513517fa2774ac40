"""The commands of the terminal, registered, and what runs a command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.main import get_command

from cache.errors import OffloadError
from offload.terminal.commands.bench import bench
from offload.terminal.commands.calibrate import calibrate
from offload.terminal.commands.convert import convert
from offload.terminal.commands.eval import evaluate
from offload.terminal.commands.model import chat, demo, generate, plan
from offload.terminal.commands.predict import predict
from offload.terminal.commands.profile import profile
from offload.terminal.commands.replay import replay
from offload.terminal.commands.trace import info, record, recover
from offload.terminal.commands.trace_import import import_log
from offload.terminal.commands.train import train_predictor
from offload.terminal.commands.tune import tune
from offload.terminal.flags import Debug, State
from offload.terminal.flat import flat
from offload.terminal.help import Command, Group, paragraphs

COMMANDS: Mapping[str, Callable[..., None]] = {
    "chat": chat,
    "generate": generate,
    "plan": plan,
    "demo": demo,
    "profile": profile,
    "tune": tune,
    "bench": bench,
    "eval": evaluate,
    "convert": convert,
    "calibrate": calibrate,
    "replay": replay,
    "predict": predict,
    "train-predictor": train_predictor,
}
TRACE_COMMANDS: Mapping[str, Callable[..., None]] = {
    "record": record,
    "recover": recover,
    "info": info,
    "import": import_log,
}

app = typer.Typer(
    name="offload",
    cls=Group,
    help="Run Mixture-of-Experts language models too big for your GPU, exactly, inside a memory budget.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
trace_app = typer.Typer(cls=Group, help="Record which experts a model's tokens go to, and study what was recorded.")
for _app, _commands in ((app, COMMANDS), (trace_app, TRACE_COMMANDS)):
    for _name, _command in _commands.items():
        _app.command(_name, cls=Command, help=paragraphs(_command.__doc__))(flat(_command))
app.add_typer(trace_app, name="trace")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
    debug: Debug = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        print(f"offload {version_of('offload')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str], state: State) -> int:
    """Runs a command line and gives its exit code. Raises OffloadError for a mistake in it, and what commands raise."""
    command = get_command(app)
    try:
        with command.make_context("offload", list(arguments), obj=state) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return int(leave.exit_code)
    except typer.TyperException as error:
        if name := next((word for word in arguments if word.startswith("-") and Path(word).exists()), None):
            raise OffloadError(f"{name} is taken for an option: write ./{name} for what lies here") from error
        where = getattr(error, "ctx", None)
        raise OffloadError(error.format_message() + (f" (see {where.command_path} --help)" if where else "")) from error
    finally:
        sys.stdout.flush()
    return 0
