"""Writes docs/cli.md from the command line's own help, so that the two cannot differ.

python scripts/docs/cli.py            write docs/cli.md
python scripts/docs/cli.py --check    exit with 1 if it is not up to date (a test does this)

Ours and not `typer ... utils docs`, which leaves out what only `--help-all` shows and all groups, and cuts sentences.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
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
error. A mistake ends as one line, `offload: error: ...`, and exit code 2; an interrupted run exits with 130.
`--debug`, before or after a command's name, shows the traceback of an error.
"""


def document() -> str:
    """The text of docs/cli.md."""
    program: Any = get_command(app)
    sections = [_INTRODUCTION, _section(program, "offload")]
    for name, command in program.commands.items():
        sections.append(_section(command, f"offload {name}"))
        inner = getattr(command, "commands", {})
        sections += [_section(one, f"offload {name} {inner_name}") for inner_name, one in inner.items()]
    return "\n".join([*sections, f"## Inside a chat\n\n```\n{HELP}\n```\n"])


def _section(command: Any, name: str) -> str:
    parts = [f"## `{name}`\n", f"```\n{_usage(command, name)}\n```\n", _paragraphs(command.help)]
    parts += _tables([parameter for parameter in command.params if not parameter.hidden])
    more = [parameter for parameter in command.params if parameter.hidden and parameter.help]
    if more:
        parts += [f"`{name} --help-all` shows these, too:\n", *_tables(more)]
    return "\n".join(parts)


def _tables(parameters: Sequence[Any]) -> Iterator[str]:
    """A table for each group."""
    groups: dict[str, list[Any]] = {}
    for parameter in parameters:
        groups.setdefault(_group(parameter), []).append(parameter)
    for group in sorted(groups, key=lambda name: name not in ("Arguments", "Options")):  # else as in the help
        rows = [f"| {_spelling(p)} | {_text(p)} |\n" for p in groups[group]]
        yield f"| {group} | |\n|---|---|\n{''.join(rows)}"


def _usage(command: Any, name: str) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    pieces = [p.metavar if p.required else f"[{p.metavar}]" for p in arguments]
    return " ".join([name, "[OPTIONS]", *pieces, *(["COMMAND"] if hasattr(command, "commands") else [])])


def _group(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    flag = FLAGS.get(parameter.name) if parameter.hidden else None
    return parameter.rich_help_panel or (flag and flag.rich_help_panel) or "Options"


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`"
    value = "" if parameter.is_flag else f" {parameter.metavar}"
    return f"`{parameter.opts[0]}{value}`"


def _text(parameter: Any) -> str:
    stated = parameter.param_type_name == "option" and parameter.default not in (None, False)
    return str(parameter.help) + (f" Default: `{parameter.default}`." if stated else "")


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n")) + "\n"


def main() -> None:
    text = document()
    if sys.argv[1:] == ["--check"]:
        if not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != text:
            sys.exit(f"{DOCUMENT} is not what the help says: run python scripts/docs/cli.py")
    else:
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
