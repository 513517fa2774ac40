"""Which field of a configuration is to blame: the one without which a model can be made of the others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_PATIENCE_S = 3.0
_MOST = 2
_NOTHING_TO_DO_WITH_IT = ("architectures", "model_type", "transformers_version")


def culprits(
    fields: Mapping[str, Any], defaults: Mapping[str, Any], attempt: Callable[[Mapping[str, Any]], object]
) -> list[tuple[str, Any]]:
    """The fields without any one of which `attempt` raises nothing, each with its value; nested ones as "a.b".

    The family's default, one of `defaults`, takes the place of what is left out. The list is empty where nothing is
    known: where `attempt` takes all the fields, where more than a few would do, and where looking takes too long.
    """
    if _works(attempt, fields):
        return []
    end = time.monotonic() + _PATIENCE_S
    found: list[tuple[str, Any]] = []
    usual = dict(_leaves(defaults))
    told = [(path, value) for path, value in _leaves(fields) if path not in usual or usual[path] != value]
    for path, value in sorted(told, key=lambda leaf: not _is_odd(leaf[1])):
        if time.monotonic() > end:
            break
        if path[-1] not in _NOTHING_TO_DO_WITH_IT and _works(attempt, _without(fields, path)):
            found.append((".".join(path), value))
    return found if len(found) <= _MOST else []


def _works(attempt: Callable[[Mapping[str, Any]], object], fields: Mapping[str, Any]) -> bool:
    try:
        attempt(fields)
    except Exception:  # whatever is wrong with these fields
        return False
    return True


def _leaves(fields: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field that holds no others."""
    for key, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _without(fields: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    key, *below = path
    if not below:
        return {name: value for name, value in fields.items() if name != key}
    return {**fields, key: _without(fields[key], tuple(below))}


def _is_odd(value: Any) -> bool:
    """Whether few fields have such a value, so that it is looked at first."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return not isinstance(value, (bool, list))
    return not math.isfinite(value) or not 0 < value < 2**31
