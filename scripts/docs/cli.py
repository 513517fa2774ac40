"""Writes docs/cli.md from the command line's own help, so that the two cannot differ.

python scripts/docs/cli.py            write docs/cli.md
python scripts/docs/cli.py --check    exit with 1 if it is not up to date (a test does this)

Ours and not `typer ... utils docs`, which leaves out what only `--help-all` shows and all groups, and cuts sentences.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from typer.main import get_command

from offload.terminal.app import app
from offload.terminal.chat import HELP
from offload.terminal.flags import FLAGS

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"
_INTRODUCTION = """\
# The command line

<!-- Written by scripts/docs/cli.py from the program's own help: change that and run it again. -->

Answers go to standard output, everything about them (progress, statistics, warnings, errors) to standard
error. A mistake ends as one line, `offload: error: ...`, and exit code 2. An error that nobody foresaw ends as one
line and exit code 1. Its traceback is then in the folder `tracebacks` of the cache folder: report it with that file.
`--debug`, before or after a command's name, shows the traceback of any error. An interrupted run exits with 130. A run
whose output nobody reads any more, as before `| head`, exits with 141. A standard output that is full or closed is an
error, once something is to be written there. What standard error cannot take is lost, and changes no exit code.
"""
_SHARED = """\
## Shared options

What loads a model takes these; each command's section says which of them.
"""


def document() -> str:
    """The text of docs/cli.md."""
    program: Any = get_command(app)
    sections = [_INTRODUCTION, _section(program, "offload")]
    for name, command in program.commands.items():
        sections.append(_section(command, f"offload {name}"))
        inner = getattr(command, "commands", {})
        sections += [_section(one, f"offload {name} {inner_name}") for inner_name, one in inner.items()]
    flags = [flag for flag in program.commands["chat"].params if flag.name in FLAGS]
    sections += [_SHARED, *_tables(flags, lambda flag: str(FLAGS[flag.name].rich_help_panel))]
    return "\n".join([*sections, f"## Inside a chat\n\n```\n{HELP}\n```\n"])


def _section(command: Any, name: str) -> str:
    parts = [f"## `{name}`\n", f"```\n{_usage(command, name)}\n```\n", f"{command.help}\n"]
    parts += _tables([parameter for parameter in command.params if not parameter.hidden], _group)
    more = [parameter for parameter in command.params if parameter.hidden and parameter.help]
    own = [parameter for parameter in more if not _is_shared(parameter)]
    if own:
        parts += [f"`{name} --help-all` also shows:\n", *_tables(own, _group)]
    if len(more) > len(own):
        shared = ", ".join(f"`{parameter.opts[0]}`" for parameter in more if parameter not in own)
        parts.append(f"`{name} --help-all` also shows these [shared options](#shared-options): {shared}.\n")
    return "\n".join(parts)


def _is_shared(parameter: Any) -> bool:
    flag = FLAGS.get(parameter.name)
    return flag is not None and flag.help == parameter.help


def _tables(parameters: Sequence[Any], group_of: Callable[[Any], str]) -> Iterator[str]:
    """A table for each group."""
    groups: dict[str, list[Any]] = {}
    for parameter in parameters:
        groups.setdefault(group_of(parameter), []).append(parameter)
    for group in sorted(groups, key=lambda name: name not in ("Arguments", "Options")):  # else as in the help
        rows = [f"| {_spelling(p)} | {_text(p)} |\n" for p in groups[group]]
        yield f"| {group} | |\n|---|---|\n{''.join(rows)}"


def _usage(command: Any, name: str) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    pieces = [_argument(p) if p.required else f"[{_argument(p)}]" for p in arguments]
    return " ".join([name, "[OPTIONS]", *pieces, *(["COMMAND"] if hasattr(command, "commands") else [])])


def _group(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return parameter.rich_help_panel or "Options"


def _argument(parameter: Any) -> str:
    return f"{parameter.metavar}{'' if parameter.nargs == 1 else '...'}"


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_argument(parameter)}`"
    value = "" if parameter.is_flag else f" {parameter.metavar}"
    return " or ".join(f"`{name}{value}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _text(parameter: Any) -> str:
    stated = parameter.param_type_name == "option" and parameter.default not in (None, False)
    return str(parameter.help) + (f" Default: `{parameter.default}`." if stated else "")


def main() -> None:
    text = document()
    if sys.argv[1:] == ["--check"]:
        if not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != text:
            sys.exit(f"{DOCUMENT} is not what the help says: run python scripts/docs/cli.py")
    else:
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
