"""Names with commas between them, as flags take them."""

from __future__ import annotations

from cache.errors import OffloadError


def split_list(text: str) -> list[str]:
    """The parts of `text` between commas, except those inside brackets. Raises OffloadError for an empty one."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise OffloadError(f'"{text}" has an empty part: write names with single commas between them')
    return parts
