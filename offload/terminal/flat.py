"""How a plain function becomes a command: its dataclasses are spread out into flags, and a long help is made short."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from offload.options import RENAMED, renamed
from offload.system.messages import notice
from offload.terminal.flags import BASIC, FLAGS, LateDebug

MOST = 15
"""Options that a `--help` shows, itself included."""


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer takes it: a flag for each field of its dataclass parameters, and `--debug`.

    A field has the flag that `FLAGS` has under its name, or brings one in its annotation. A parameter of the command's
    own takes the place of a field with that name, which stays at its default. Where that makes more flags than `MOST`,
    `--help` leaves out those of `FLAGS` that are not basic, and `--help-all` shows everything; what is hidden and has
    no help text is shown nowhere.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation)
    }
    own = [p for name, p in signature.parameters.items() if name not in groups]
    taken = {parameter.name for parameter in own}
    names = {name: [field.name for field in fields(group) if field.name not in taken] for name, group in groups.items()}
    given = [option for name, group in groups.items() for option in _options(group, names[name])]
    shared = sorted((p for p in given if _info(p) in FLAGS.values()), key=lambda p: list(FLAGS).index(p.name))
    parameters = _with_help_all([*own, *shared, *(p for p in given if p not in shared)], {p.name for p in shared})
    old = [name for name, now in RENAMED.items() if now in {parameter.name for parameter in shared}]
    parameters += [_keyword(name, Annotated[str | None, typer.Option(hidden=True)], None) for name in old]
    parameters.append(_keyword("debug", LateDebug, False))

    @functools.wraps(command)
    def wrapper(*, debug: bool, help_all: bool = False, **values: Any) -> None:
        values = renamed(values, lambda old, now: notice(f"{_spelled(old)} is {_spelled(now)} now"))
        for name, group in groups.items():
            values[name] = group(**{field: values.pop(field) for field in names[name]})
        command(**values)

    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _options(group: type[Any], names: Sequence[str]) -> Iterator[inspect.Parameter]:
    """A parameter for each of the fields `names` of a dataclass."""
    hints = get_type_hints(group, include_extras=True)
    for name in names:
        hint = hints[name]
        annotation = hint if get_origin(hint) is Annotated else Annotated[_typed(hint), FLAGS[name]]
        yield _keyword(name, annotation, group.__dataclass_fields__[name].default)


def _typed(hint: Any) -> Any:
    """What is typed for a field of type `hint`: the first of several, so a text for a size in text or bytes."""
    if get_origin(hint) is not UnionType:
        return hint
    first, *others = get_args(hint)
    return first | None if NoneType in others else first


def _with_help_all(parameters: list[inspect.Parameter], shared: set[str]) -> list[inspect.Parameter]:
    """The `parameters` with what a short help leaves out hidden, and `--help-all` where that is anything."""
    infos = [info for info in map(_info, parameters) if info is not None]
    shown = sum(not info.hidden for info in infos)
    hidden = sum(bool(info.hidden and info.help) for info in infos)
    if shown < MOST and not hidden:  # with --help
        return parameters
    short = [_shortened(parameter) if parameter.name in shared else parameter for parameter in parameters]
    return [*short, _help_all({name: FLAGS[name].rich_help_panel for name in shared}, shown + hidden)]


def _shortened(parameter: inspect.Parameter) -> inspect.Parameter:
    """A shared flag as a short help has it: in no group, and hidden if it is not basic."""
    kind, info = get_args(parameter.annotation)
    info = copy.copy(info)
    info.rich_help_panel = None
    info.hidden = parameter.name not in BASIC
    return parameter.replace(annotation=Annotated[kind, info])


def _help_all(groups: Mapping[str, str], total: int) -> inspect.Parameter:
    def show(context: typer.Context, value: bool) -> None:
        if not value:
            return
        for parameter in context.command.params:
            option: Any = parameter
            option.hidden = option.hidden and not option.help
            option.rich_help_panel = groups.get(option.name, option.rich_help_panel)
        print(context.get_help())
        raise typer.Exit

    option = typer.Option("--help-all", help=f"Show all {total} options, and leave.", is_eager=True, callback=show)
    return _keyword("help_all", Annotated[bool, option], False)


def _info(parameter: inspect.Parameter) -> OptionInfo | None:
    found = [each for each in get_args(parameter.annotation)[1:] if isinstance(each, OptionInfo)]
    return found[0] if found else None


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
