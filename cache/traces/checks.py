"""What a routing trace must be like to be replayed: every kind of damage ends as one line, saying what and where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cache.errors import TraceError

if TYPE_CHECKING:
    from cache.traces.trace import Trace

_BLOCK_ELEMENTS = 2**21
_IDS, _FLOATS = ("uint8", "uint16"), ("float16", "float32")


def check_structure(trace: Trace) -> None:
    """Metadata, dtypes and shapes. Raises TraceError."""
    layers, experts, top_k = (_number(trace, key) for key in ("num_layers", "num_experts", "top_k"))
    for key in ("model", "workload", "source"):
        if key not in trace.metadata:
            _fail(trace, f'its metadata has no "{key}"')
    if "expert_bytes" in trace.metadata:
        _number(trace, "expert_bytes")
    if top_k > experts:
        _fail(trace, f"its metadata says that a token goes to {top_k} of {experts} experts")
    _check_layers(trace, layers)
    tokens = len(trace.step) if trace.step.ndim == 1 else -1
    wanted: dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]] = {
        "step": (("int32",), (tokens,)),
        "experts": (_IDS, (tokens, layers, top_k)),
        "weights": (_FLOATS, (tokens, layers, top_k)),
        "phase": (("uint8",), (tokens,)),
        "sequence_offsets": (("int64",), (None,)),
        "forward": (("int64",), (tokens,)),
        "scores": (("float16",), (tokens, layers, experts)),
        "predicted": (_IDS, (tokens, layers, None, None)),
    }
    for name, (dtypes, shape) in wanted.items():
        array = getattr(trace, name)
        if array is None:
            continue
        if array.dtype.name not in dtypes:
            _fail(trace, f'"{name}" has dtype {array.dtype}, not {" or ".join(dtypes)}')
        if array.ndim != len(shape) or any(b not in (None, a) for a, b in zip(array.shape, shape, strict=True)):
            said = ", ".join("any" if size is None else str(size) for size in shape)
            _fail(trace, f'"{name}" has the shape {list(array.shape)}, not [{said}]')
    if experts > np.iinfo(trace.experts.dtype).max + 1:
        _fail(trace, f'"experts" is {trace.experts.dtype}, too narrow for {experts} experts')


def check_contents(trace: Trace) -> None:
    """Every value, in blocks of tokens; assumes the structure. Raises TraceError."""
    _check_offsets(trace)
    for start, end in _blocks(trace):
        _check_order(trace, start, end)
        _check_routing(trace, start, end)
        _check_extras(trace, start, end)


def _check_layers(trace: Trace, num_layers: int) -> None:
    text = trace.metadata.get("layers", "")
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        _fail(trace, f'its metadata says "layers": "{text}", not numbers such as "0,1,2"')
    layers = [int(part) for part in parts]
    if len(layers) != num_layers or sorted(set(layers)) != layers:
        _fail(trace, f'"layers" in its metadata must be {num_layers} ascending numbers, not "{text}"')


def _check_offsets(trace: Trace) -> None:
    offsets = trace.sequence_offsets
    if len(offsets) < 2 or not trace.num_tokens:
        _fail(trace, "it has no sequence")
    if offsets[0] != 0 or offsets[-1] != trace.num_tokens:
        _fail(trace, f"its sequences cover the tokens {offsets[0]} to {offsets[-1]}, it has {trace.num_tokens}")
    wrong = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if wrong.size:
        s = wrong[0]
        _fail(trace, f"sequence {s} goes from token {offsets[s]} to {offsets[s + 1]}: offsets must ascend")


def _check_order(trace: Trace, start: int, end: int) -> None:
    """Phases, and passes that only go forward within a sequence. Looks at the token before the block too."""
    phase, step = trace.phase[start:end], trace.step[start:end]
    _refuse(trace, start, phase > 2, "its phase is {}, not 0, 1 or 2", phase)
    _refuse(trace, start, step < 0, "its step is {}, below 0", step)
    before = max(start - 1, 0)
    change = np.diff(trace.step[before:end])
    # Between two sequences steps begin anew.
    offsets = trace.sequence_offsets
    inner = np.ones(len(change), bool)
    bounds = offsets[np.searchsorted(offsets, before + 1) : np.searchsorted(offsets, end)]
    inner[bounds - before - 1] = False
    later = trace.step[before + 1 : end]
    _refuse(trace, before + 1, inner & (change < 0), "its step {} is before the previous token's", later)
    if trace.forward is None:
        return
    forward = trace.forward[start:end]
    _refuse(trace, start, forward < 0, "its forward pass is {}, below 0", forward)
    moved = np.diff(trace.forward[before:end])
    wrong = inner & ((moved < 0) | ((moved == 0) != (change == 0)))
    _refuse(trace, before + 1, wrong, "its forward pass {} does not go with its step", trace.forward[before + 1 : end])


def _check_routing(trace: Trace, start: int, end: int) -> None:
    experts, weights = trace.experts[start:end], trace.weights[start:end]
    num_experts = trace.num_experts
    if np.iinfo(experts.dtype).max >= num_experts:
        _refuse(trace, start, experts >= num_experts, f"expert {{}} of {num_experts}", experts)
    ordered = np.sort(experts, axis=-1)
    twice = ordered[..., 1:] == ordered[..., :-1]
    _refuse(trace, start, twice, "expert {} twice", ordered[..., 1:])
    _refuse(trace, start, ~np.isfinite(weights), "a weight of {}", weights)
    _refuse(trace, start, weights[..., 1:] > weights[..., :-1], "weights that ascend, to {}", weights[..., 1:])


def _check_extras(trace: Trace, start: int, end: int) -> None:
    if trace.scores is not None:
        scores = trace.scores[start:end]
        # Minus infinity is what a router gives an expert that a token may not have.
        _refuse(trace, start, np.isnan(scores) | (scores == np.inf), "a score of {}", scores)
    if trace.predicted is not None:
        predicted = trace.predicted[start:end]
        _refuse(
            trace, start, predicted >= trace.num_experts, f"predicted expert {{}} of {trace.num_experts}", predicted
        )


def _blocks(trace: Trace) -> Iterator[tuple[int, int]]:
    widest = max(array[:1].size for array in (trace.experts, trace.scores, trace.predicted) if array is not None)
    tokens = max(1, _BLOCK_ELEMENTS // widest)
    return ((start, min(start + tokens, trace.num_tokens)) for start in range(0, trace.num_tokens, tokens))


def _number(trace: Trace, key: str) -> int:
    text = trace.metadata.get(key)
    if text is None:
        _fail(trace, f'its metadata has no "{key}"')
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        _fail(trace, f'its metadata says "{key}": "{text}", not a number above 0')
    return int(text)


def _refuse(trace: Trace, start: int, wrong: NDArray[np.bool_], what: str, values: NDArray[Any]) -> None:
    """Raise for the first token, from `start` on, where `wrong` [tokens] or [tokens, layers, ...] holds."""
    if wrong.any():
        place = np.unravel_index(wrong.argmax(), wrong.shape)
        where = f"token {start + place[0]}" + (f", layer {place[1]}" if len(place) > 1 else "")
        _fail(trace, f"{where}: {what.format(values[place])}")


def _fail(trace: Trace, what: str) -> NoReturn:
    raise TraceError(f"{trace.name} is damaged or no trace: {what}")
