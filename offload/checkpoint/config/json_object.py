"""A JSON object in a stranger's file: read with limits of size and depth, and what is wrong said in one line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from cache.errors import CheckpointError
from offload.system.text import summary

MOST_BYTES = 16 * 2**20
"""More than any file has that says something around the weights."""
_DEEPEST = 100
_LONGEST = 60
_AGAIN = "copy or download it again"


def read_json_object(path: Path, *, most_bytes: int = MOST_BYTES, mark: bool = True) -> dict[str, Any]:
    """The JSON object in the file at `path`, which is UTF-8, and may begin with a byte order `mark`.

    Raises CheckpointError for anything else, and for what is larger or nested deeper than any such file. Warns of a key
    that is there twice: the last one counts, as everywhere.
    """
    check_size(path, most_bytes)

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found and found[key] != value:
                warnings.warn(f"{path}: {shown(key)} is there twice: the last one counts", stacklevel=2)
            found[key] = value
        return found

    try:
        fields = json.loads(path.read_text("utf-8-sig" if mark else "utf-8"), object_pairs_hook=made)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({summary(error)}): {_AGAIN}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is not a JSON object: {_AGAIN}")
    if not _is_shallow(fields):
        raise CheckpointError(f"{path} is nested more than {_DEEPEST} deep: {_AGAIN}")
    return fields


def check_size(path: Path, most_bytes: int = MOST_BYTES) -> None:
    """Raises CheckpointError for a file that has more bytes, before any is read."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if size > most_bytes:
        raise CheckpointError(f"{path} has {size} bytes, and no such file has more than {most_bytes}: {_AGAIN}")


def _is_shallow(fields: Any) -> bool:
    """Whether it is nested no deeper than a reader's stack bears."""
    level = [fields]
    for _ in range(_DEEPEST):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for values in inside for value in values if isinstance(value, (dict, list))]
    return not level


def shown(value: Any) -> str:
    """A value as it stands in such a file, or its beginning."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
