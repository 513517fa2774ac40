"""Text of others, made safe to show: what a file or a server says must not steer the terminal."""

from __future__ import annotations

_CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """`text` without the control characters by which it could steer a terminal; line breaks and tabs stay."""
    return text.translate(_CONTROL)
