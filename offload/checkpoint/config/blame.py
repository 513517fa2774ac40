"""Which field of a configuration is to blame: the one without which a model can be made of the others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_Path = tuple[str, ...]
_Leaf = tuple[_Path, Any]
_PATIENCE_S = 3.0
_MOST = 2
_NOTHING_TO_DO_WITH_IT = ("architectures", "model_type", "transformers_version")


def culprits(
    fields: Mapping[str, Any], defaults: Mapping[str, Any], attempt: Callable[[Mapping[str, Any]], object]
) -> list[tuple[str, Any]]:
    """The fields with another value of any one of which `attempt` raises nothing, each with its value; nested ones as
    "a.b".

    The other value is the family's default, one of `defaults`, which takes the place of what is left out; or 1, for a
    number, since a default may not fit the other fields either. The list is empty where nothing is known: where
    `attempt` takes all the fields, where more than a few would do, and where looking takes too long.
    """
    if _works(attempt, fields):
        return []
    usual = dict(_leaves(defaults))
    told = [(path, value) for path, value in _leaves(fields) if path not in usual or usual[path] != value]
    told = [leaf for leaf in told if leaf[0][-1] not in _NOTHING_TO_DO_WITH_IT]
    told.sort(key=lambda leaf: not _is_odd(leaf[1]))
    left_out = _those(told, lambda path: _works(attempt, _without(fields, path)))
    numbers = [leaf for leaf in told if isinstance(leaf[1], (int, float)) and leaf not in left_out]
    found = left_out + _those(numbers, lambda path: _works(attempt, _with_one(fields, path)))
    few = next((each for each in (found, left_out) if len(each) <= _MOST), [])
    return [(".".join(leaf[0]), leaf[1]) for leaf in told if leaf in few]


def _those(leaves: list[_Leaf], are: Callable[[_Path], bool]) -> list[_Leaf]:
    """Those of the leaves that `are`, as far as there is patience."""
    end = time.monotonic() + _PATIENCE_S
    return [leaf for leaf in leaves if time.monotonic() <= end and are(leaf[0])]


def _works(attempt: Callable[[Mapping[str, Any]], object], fields: Mapping[str, Any]) -> bool:
    try:
        attempt(fields)
    except Exception:  # whatever is wrong with these fields
        return False
    return True


def _leaves(fields: Mapping[str, Any], above: _Path = ()) -> Iterator[_Leaf]:
    """Every field that holds no others."""
    for key, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _without(fields: Mapping[str, Any], path: _Path) -> dict[str, Any]:
    key, *below = path
    if not below:
        return {name: value for name, value in fields.items() if name != key}
    return {**fields, key: _without(fields[key], tuple(below))}


def _with_one(fields: Mapping[str, Any], path: _Path) -> dict[str, Any]:
    key, *below = path
    return {**fields, key: _with_one(fields[key], tuple(below)) if below else 1}


def _is_odd(value: Any) -> bool:
    """Whether few fields have such a value, so that it is looked at first."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return not isinstance(value, (bool, list))
    return not math.isfinite(value) or not 0 < value < 2**31
