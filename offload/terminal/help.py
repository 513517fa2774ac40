"""What `--help` shows of a command: paragraphs that the terminal breaks into lines, and no values for switches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup


def paragraphs(text: str | None) -> str:
    """`text` with each paragraph on one line, as wide as its reader has it."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


class Command(TyperCommand):
    """A command; its switches are not shown as if they took a value."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_values(super().get_params(ctx))


class Group(TyperGroup):
    """Commands together, with switches of their own."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_values(super().get_params(ctx))


def _without_values(parameters: Sequence[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""  # else typer says <bool>
    return list(parameters)
