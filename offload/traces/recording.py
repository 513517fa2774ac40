"""A block in which what a runtime routes is recorded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cache.errors import TraceError
from offload.checkpoint.layout import ExpertMap
from offload.traces.recorder import TraceRecorder

if TYPE_CHECKING:
    from offload.engine.runtime import ExpertRuntime


@contextmanager
def recording(
    path: str | os.PathLike[str],
    model: Any,
    runtime: ExpertRuntime,
    experts: ExpertMap,
    metadata: Mapping[str, str],
    *,
    scores: bool,
    predicted: int,
    inputs: bool,
) -> Iterator[TraceRecorder]:
    """While the block runs, what `runtime` routes is recorded; see `OffloadedModel.record_trace`."""
    if runtime.recorder is not None:
        raise TraceError("a trace is being recorded already: one at a time")
    recorder = TraceRecorder(path, model, experts, metadata, scores=scores, predicted=predicted, inputs=inputs)
    runtime.recorder = recorder
    finished = False
    try:
        yield recorder
        finished = True
    finally:
        runtime.recorder = None
        recorder.close(keep_unfinished=finished)
