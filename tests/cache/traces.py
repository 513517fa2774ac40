"""Random routing traces, and where the recorded ones are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cache.traces.trace import DECODE, PADDING, PREFILL, Trace
from cache.traces.writer import Rows, TraceWriter

SHARED = Path(__file__).parents[3] / "shared" / "data" / "traces"
SMALL = "gpt-oss-20b.mmlu.small"


def recorded(name: str) -> Trace:
    """A recorded trace of a real model; skips the test where it is not at hand."""
    path = SHARED / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return Trace.open(path)


def routing(
    rng: np.random.Generator, tokens: int, layers: int, experts: int, top_k: int, ties: bool = True
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and descending weights [tokens, layers, top_k], skewed; many weights are equal if `ties`."""
    favour = rng.gumbel(size=(tokens, layers, experts)) + np.linspace(0, 2, experts)
    ids = np.argsort(-favour, axis=-1)[..., :top_k]
    weights = rng.integers(1, 5, ids.shape) / 8 if ties else rng.random(ids.shape)
    return ids, -np.sort(-weights.astype(np.float32), axis=-1)


def random_trace(seed: int = 0, lengths: tuple[int, ...] = (7, 3, 5), layers: int = 2, **kwargs: Any) -> Trace:
    """Sequences of single-token steps."""
    experts, top_k = kwargs.pop("experts", 6), kwargs.pop("top_k", 2)
    ids, weights = routing(np.random.default_rng(seed), sum(lengths), layers, experts, top_k, kwargs.pop("ties", True))
    return Trace.from_arrays(ids, weights, np.cumsum([0, *lengths]), num_experts=experts, **kwargs)


def batched_trace(seed: int = 0, layers: int = 2, experts: int = 6, top_k: int = 2) -> Trace:
    """A batch of three with left padding, prompts in two chunks and a row that ends early; then one sequence alone."""
    rng = np.random.default_rng(seed)
    passes = [3, 2, 1, 1, 1]  # tokens a row
    step = np.repeat(np.arange(len(passes)), passes)
    rows, phases, forwards = [], [], []
    for padding, ended in ((2, 0), (0, 0), (4, 2)):
        phase = np.where(step < 2, PREFILL, DECODE)
        phase[:padding] = PADDING
        phase[len(phase) - ended :] = PADDING
        rows.append(step)
        phases.append(phase)
        forwards.append(step + 10)
    rows.append(np.array([0, 0, 0, 1, 2]))
    phases.append(np.array([PREFILL] * 3 + [DECODE] * 2))
    forwards.append(rows[-1] + 20)
    lengths = [len(row) for row in rows]
    ids, weights = routing(rng, sum(lengths), layers, experts, top_k)
    return Trace.from_arrays(
        ids,
        weights,
        np.cumsum([0, *lengths]),
        num_experts=experts,
        step=np.concatenate(rows),
        phase=np.concatenate(phases),
        forward=np.concatenate(forwards),
    )


def writer_of(trace: Trace, path: Path) -> tuple[TraceWriter, list[Rows]]:
    """A writer for `trace`, and its passes as rows."""
    passes_seen = trace.step if trace.forward is None else trace.forward
    order = np.argsort(passes_seen, kind="stable")
    owner = np.repeat(np.arange(trace.num_sequences), np.diff(trace.sequence_offsets))
    rows = []
    for number in np.unique(passes_seen):
        tokens = order[passes_seen[order] == number]
        rows.append(
            Rows(
                owner[tokens],
                int(number),
                int(trace.step[tokens[0]]),
                trace.phase[tokens],
                trace.experts[tokens],
                trace.weights[tokens],
                None if trace.scores is None else trace.scores[tokens],
                None if trace.predicted is None else trace.predicted[tokens],
                None if trace.ids is None else trace.ids[tokens],
                None if trace.embeddings is None else trace.embeddings[tokens],
            )
        )
    predicted = None if trace.predicted is None else (trace.predicted.shape[2], trace.predicted.shape[3])
    optional = {"scores": trace.scores is not None, "predicted": predicted}
    embeddings = 0 if trace.embeddings is None else trace.embeddings.shape[1]
    return TraceWriter(path, trace.metadata, **optional, embeddings=embeddings), rows  # type: ignore[arg-type]


def with_everything(seed: int = 0) -> Trace:
    """A batched trace with all optional arrays."""
    trace = batched_trace(seed)
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(trace.num_tokens, 2, 6)).astype(np.float16)
    scores[0, 0, 3] = -np.inf
    count = trace.num_tokens
    return replace(
        trace,
        scores=scores,
        predicted=rng.integers(0, 6, (count, 2, 3, 4), dtype=np.uint8),
        ids=rng.integers(0, 1000, count, dtype=np.int32),
        embeddings=rng.normal(size=(count, 5)).astype(np.float16),
    )
