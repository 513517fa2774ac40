"""A trace with every use of an expert by itself, as policies that know nothing of events are judged by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cache.traces.trace import Trace


def one_by_one(trace: Trace) -> Trace:
    """`trace` with every use of an expert by a token as a forward pass of its own, in touch order; in memory.

    Scores, predictions and what passes read, which belong to whole events, are left out.
    """
    order = np.lexsort((trace.experts, trace.weights))
    experts, weights = (
        np.take_along_axis(array, order, axis=-1).swapaxes(1, 2).reshape(-1, trace.num_layers, 1)
        for array in (trace.experts, trace.weights)
    )
    offsets = trace.sequence_offsets * trace.top_k
    uses = np.arange(len(experts))
    forward = None
    if trace.forward is not None:
        tokens = np.argsort(trace.forward, kind="stable")
        forward = np.empty_like(uses)
        forward.reshape(-1, trace.top_k)[tokens] = uses.reshape(-1, trace.top_k)
    return replace(
        trace,
        experts=experts,
        weights=weights,
        sequence_offsets=offsets,
        step=(uses - np.repeat(offsets[:-1], np.diff(offsets))).astype(np.int32),
        phase=np.repeat(trace.phase, trace.top_k),
        metadata={**trace.metadata, "top_k": "1"},
        forward=forward,
        scores=None,
        predicted=None,
        ids=None,
        embeddings=None,
    )
