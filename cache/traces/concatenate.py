"""Several traces of one model as one, written without reading them into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import TraceError
from cache.traces.tensorfile import Column, row_blocks, write_tensors
from cache.traces.trace import PER_TOKEN, Trace

_ALIKE = ("model", "num_layers", "num_experts", "top_k", "layers", "expert_bytes", "score_function")


def concatenate(traces: Sequence[Trace], path: str | os.PathLike[str]) -> Trace:
    """Write `traces` of one model one after the other to the file `path`, and open it.

    Atomic, and in little memory. Metadata on which they differ is joined with " + ". Raises TraceError for traces of
    different models or shapes, or of which only some have `scores` or `predicted`.
    """
    first, *others = traces
    for other in others:
        for what in _ALIKE:
            one, another = first.metadata.get(what), other.metadata.get(what)
            if one != another:
                raise TraceError(f"{first.name} and {other.name} do not belong together: {what} is {one} and {another}")
    columns = {"sequence_offsets": _joined([_shifted_offsets(traces)])}
    for name in PER_TOKEN:
        arrays = [getattr(trace, name) for trace in traces]
        if name == "forward" and any(array is not None for array in arrays):
            columns[name] = _joined(_shifted_forwards(traces))
        elif all(array is not None for array in arrays):
            if len({array.shape[1:] for array in arrays}) > 1:
                raise TraceError(
                    f"{first.name} and others have {name} of different shapes: they do not belong together"
                )
            columns[name] = _joined(arrays)
        elif any(array is not None for array in arrays):
            without = next(trace.name for trace in traces if getattr(trace, name) is None)
            raise TraceError(f"{without} has no {name}, others have: they cannot be one trace")
    metadata: dict[str, str] = {}
    for key in dict.fromkeys(key for trace in traces for key in trace.metadata):
        metadata[key] = " + ".join(dict.fromkeys(t.metadata[key] for t in traces if key in t.metadata))
    write_tensors(path, columns, metadata)
    return Trace.open(path, check=False)


def _joined(arrays: Sequence[NDArray[Any]]) -> Column:
    dtype = np.result_type(*(array.dtype for array in arrays))
    shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
    return Column(dtype, shape, (block for array in arrays for block in row_blocks(array)))


def _shifted_offsets(traces: Sequence[Trace]) -> NDArray[np.int64]:
    starts = np.cumsum([0, *(trace.num_tokens for trace in traces)])
    return np.concatenate(
        [[0], *(trace.sequence_offsets[1:] + start for trace, start in zip(traces, starts[:-1], strict=True))]
    )


def _shifted_forwards(traces: Sequence[Trace]) -> list[NDArray[np.int64]]:
    """Every trace's forward passes, numbered on from the one before."""
    shifted, start = [], 0
    for trace in traces:
        forward = trace.forward
        if forward is None:
            begins = np.diff(trace.step, prepend=-1) != 0
            begins[trace.sequence_offsets[:-1]] = True
            forward = np.cumsum(begins) - 1
        shifted.append(forward - forward.min() + start)
        start = int(shifted[-1].max()) + 1
    return shifted
