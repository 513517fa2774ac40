"""Text of others, such as what a file, a server or a library says: made whole, harmless, or one line."""

from __future__ import annotations

_CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """`text` without the control characters by which it could steer a terminal; line breaks and tabs stay."""
    return text.translate(_CONTROL)


def without_surrogates(text: str) -> str:
    """`text` with pairs of surrogates joined, and lone ones replaced: no tokenizer and no file takes those."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def one_line(said: object) -> str:
    """The text of `said`, with a space for line breaks and whatever other blanks stand together."""
    return " ".join(str(said).split())


def summary(error: BaseException) -> str:
    """The type of `error` and what it says, in one line."""
    name, said = type(error).__name__, one_line(error)
    return f"{name}: {said}" if said else name
