"""What a routing trace must be like to be replayed: every kind of damage ends as one line, saying what and where.

The arrays are a trace's, by their names in `cache.traces.trace.Trace`; optional ones that it lacks are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cache.errors import TraceError

Arrays = Mapping[str, NDArray[Any]]

_BLOCK_ELEMENTS = 2**21
_IDS, _FLOATS = ("uint8", "uint16"), ("float16", "float32")


class _Damage(Exception):
    """What is wrong; `_named` says with which trace."""


def check_structure(name: str, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    """Metadata, dtypes and shapes. Raises TraceError, which calls the trace `name`."""
    with _named(name):
        layers, experts, top_k = (_number(metadata, key) for key in ("num_layers", "num_experts", "top_k"))
        for key in ("model", "workload", "source"):
            if key not in metadata:
                _fail(f'its metadata has no "{key}"')
        if "expert_bytes" in metadata:
            _number(metadata, "expert_bytes")
        if top_k > experts:
            _fail(f"its metadata says that a token goes to {top_k} of {experts} experts")
        _check_layers(metadata, layers)
        _check_shapes(arrays, layers, experts, top_k)
        if experts > np.iinfo(arrays["experts"].dtype).max + 1:
            _fail(f'"experts" is {arrays["experts"].dtype}, too narrow for {experts} experts')


def check_contents(name: str, arrays: Arrays, num_experts: int) -> None:
    """Every value, in blocks of tokens; assumes the structure. Raises TraceError, which calls the trace `name`."""
    with _named(name):
        _check_offsets(arrays["sequence_offsets"], len(arrays["step"]))
        for start, end in _blocks(arrays):
            block = {key: array[start:end] for key, array in arrays.items() if key != "sequence_offsets"}
            _check_order(arrays, start, end)
            _check_routing(block, start, num_experts)
            _check_extras(block, start, num_experts)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except _Damage as damage:
        raise TraceError(f"{name} is damaged or no trace: {damage}") from None


def _check_shapes(arrays: Arrays, layers: int, experts: int, top_k: int) -> None:
    tokens = len(arrays["step"]) if arrays["step"].ndim == 1 else -1
    wanted: dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]] = {
        "step": (("int32",), (tokens,)),
        "experts": (_IDS, (tokens, layers, top_k)),
        "weights": (_FLOATS, (tokens, layers, top_k)),
        "phase": (("uint8",), (tokens,)),
        "sequence_offsets": (("int64",), (None,)),
        "forward": (("int64",), (tokens,)),
        "scores": (("float16",), (tokens, layers, experts)),
        "predicted": (_IDS, (tokens, layers, None, None)),
        "ids": (("int32",), (tokens,)),
        "embeddings": (("float16",), (tokens, None)),
    }
    for name, (dtypes, shape) in wanted.items():
        array = arrays.get(name)
        if array is None:
            continue
        if array.dtype.name not in dtypes:
            _fail(f'"{name}" has dtype {array.dtype}, not {" or ".join(dtypes)}')
        if array.ndim != len(shape) or any(b not in (None, a) for a, b in zip(array.shape, shape, strict=True)):
            said = ", ".join("any" if size is None else str(size) for size in shape)
            _fail(f'"{name}" has the shape {list(array.shape)}, not [{said}]')


def _check_layers(metadata: Mapping[str, str], num_layers: int) -> None:
    text = metadata.get("layers", "")
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        _fail(f'its metadata says "layers": "{text}", not numbers such as "0,1,2"')
    layers = [int(part) for part in parts]
    if len(layers) != num_layers or sorted(set(layers)) != layers:
        _fail(f'"layers" in its metadata must be {num_layers} ascending numbers, not "{text}"')


def _check_offsets(offsets: NDArray[np.int64], num_tokens: int) -> None:
    if len(offsets) < 2 or not num_tokens:
        _fail("it has no sequence")
    if offsets[0] != 0 or offsets[-1] != num_tokens:
        _fail(f"its sequences cover the tokens {offsets[0]} to {offsets[-1]}, it has {num_tokens}")
    wrong = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if wrong.size:
        s = wrong[0]
        _fail(f"sequence {s} goes from token {offsets[s]} to {offsets[s + 1]}: offsets must ascend")


def _check_order(arrays: Arrays, start: int, end: int) -> None:
    """Phases, and passes that only go forward within a sequence. Looks at the token before the block too."""
    phase, step = arrays["phase"][start:end], arrays["step"][start:end]
    _refuse(start, phase > 2, "its phase is {}, not 0, 1 or 2", phase)
    _refuse(start, step < 0, "its step is {}, below 0", step)
    before = max(start - 1, 0)
    change = np.diff(arrays["step"][before:end])
    # Between two sequences steps begin anew.
    offsets = arrays["sequence_offsets"]
    inner = np.ones(len(change), bool)
    bounds = offsets[np.searchsorted(offsets, before + 1) : np.searchsorted(offsets, end)]
    inner[bounds - before - 1] = False
    later = arrays["step"][before + 1 : end]
    _refuse(before + 1, inner & (change < 0), "its step {} is before the previous token's", later)
    if "forward" not in arrays:
        return
    forward = arrays["forward"][start:end]
    _refuse(start, forward < 0, "its forward pass is {}, below 0", forward)
    moved = np.diff(arrays["forward"][before:end])
    wrong = inner & ((moved < 0) | ((moved == 0) != (change == 0)))
    _refuse(before + 1, wrong, "its forward pass {} does not go with its step", arrays["forward"][before + 1 : end])


def _check_routing(block: Arrays, start: int, num_experts: int) -> None:
    experts, weights = block["experts"], block["weights"]
    if np.iinfo(experts.dtype).max >= num_experts:
        _refuse(start, experts >= num_experts, f"expert {{}} of {num_experts}", experts)
    ordered = np.sort(experts, axis=-1)
    twice = ordered[..., 1:] == ordered[..., :-1]
    _refuse(start, twice, "expert {} twice", ordered[..., 1:])
    _refuse(start, ~np.isfinite(weights), "a weight of {}", weights)
    _refuse(start, weights[..., 1:] > weights[..., :-1], "weights that ascend, to {}", weights[..., 1:])


def _check_extras(block: Arrays, start: int, num_experts: int) -> None:
    if "scores" in block:
        scores = block["scores"]
        # Minus infinity is what a router gives an expert that a token may not have.
        _refuse(start, np.isnan(scores) | (scores == np.inf), "a score of {}", scores)
    if "predicted" in block:
        predicted = block["predicted"]
        _refuse(start, predicted >= num_experts, f"predicted expert {{}} of {num_experts}", predicted)
    if "ids" in block:
        _refuse(start, block["ids"] < 0, "the id {}, below 0", block["ids"])
    if "embeddings" in block:
        _refuse_any(start, ~np.isfinite(block["embeddings"]), "an embedding with {}", block["embeddings"])


def _blocks(arrays: Arrays) -> Iterator[tuple[int, int]]:
    widest = max(arrays[name][:1].size for name in ("experts", "scores", "predicted") if name in arrays)
    tokens, num_tokens = max(1, _BLOCK_ELEMENTS // widest), len(arrays["step"])
    return ((start, min(start + tokens, num_tokens)) for start in range(0, num_tokens, tokens))


def _number(metadata: Mapping[str, str], key: str) -> int:
    text = metadata.get(key)
    if text is None:
        _fail(f'its metadata has no "{key}"')
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        _fail(f'its metadata says "{key}": "{text}", not a number above 0')
    return int(text)


def _refuse_any(start: int, wrong: NDArray[np.bool_], what: str, values: NDArray[Any]) -> None:
    """As `_refuse`, of arrays [tokens, D] that no layer has."""
    if wrong.any():
        place = np.unravel_index(wrong.argmax(), wrong.shape)
        _fail(f"token {start + place[0]}: {what.format(values[place])}")


def _refuse(start: int, wrong: NDArray[np.bool_], what: str, values: NDArray[Any]) -> None:
    """Raise for the first token, from `start` on, where `wrong` [tokens] or [tokens, layers, ...] holds."""
    if wrong.any():
        place = np.unravel_index(wrong.argmax(), wrong.shape)
        where = f"token {start + place[0]}" + (f", layer {place[1]}" if len(place) > 1 else "")
        _fail(f"{where}: {what.format(values[place])}")


def _fail(what: str) -> NoReturn:
    raise _Damage(what)
