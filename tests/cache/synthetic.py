"""Made-up traces: one that tells policies apart, and small random ones."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.trace import DECODE, PADDING, PREFILL, Trace

LAYERS, EXPERTS, TOP_K = 4, 32, 4
PROMPTS = ((6,), (11,), (4, 5), (9,), (5,), (7,), (3, 3))
"""Tokens of each of a sequence's prefill passes."""
TOKENS = 400


def zipf_markov(seed: int = 20) -> Trace:
    """Skewed, sticky routing: scores are the logarithm of a Zipf popularity plus a noise that is a Markov chain.

    Popular experts change from sequence to sequence, so that recency and frequency disagree. The generator
    is Python's, whose `random` gives the same numbers everywhere.
    """
    rng = random.Random(seed)
    scores = np.zeros((TOKENS, LAYERS, EXPERTS), np.float16)
    step, phase = np.zeros(TOKENS, np.int32), np.full(TOKENS, DECODE, np.uint8)
    offsets = [round(TOKENS * s / len(PROMPTS)) for s in range(len(PROMPTS) + 1)]
    noise = [[0.0] * EXPERTS for _ in range(LAYERS)]
    for s, (start, end) in enumerate(itertools.pairwise(offsets)):
        passes = [number for number, size in enumerate(PROMPTS[s]) for _ in range(size)]
        step[start : start + len(passes)] = passes
        phase[start : start + len(passes)] = PREFILL
        step[start + len(passes) : end] = len(PROMPTS[s]) + np.arange(end - start - len(passes))
        for token in range(start, end):
            for layer in range(LAYERS):
                for expert in range(EXPERTS):
                    normal = sum(rng.random() for _ in range(12)) - 6
                    noise[layer][expert] = 0.85 * noise[layer][expert] + 0.53 * normal
                    rank = (7 * expert + 5 * layer + 3 * s) % EXPERTS
                    scores[token, layer, expert] = noise[layer][expert] - 0.9 * math.log(rank + 1)
    experts = np.argsort(-scores, axis=2, kind="stable")[:, :, :TOP_K]
    chosen = np.take_along_axis(scores, experts, axis=2).astype(np.float64)
    weights = np.exp(chosen - chosen[:, :, :1])
    weights /= weights.sum(axis=2, keepdims=True)
    return Trace.from_arrays(
        experts,
        weights,
        offsets,
        num_experts=EXPERTS,
        step=step,
        phase=phase,
        scores=scores,
        name=f"zipf-markov-{seed}",
        metadata={"expert_bytes": "1000", "score_function": "softmax"},
    )


def random_trace(seed: int, *, batched: bool = False, scores: bool = False) -> Trace:
    """A few sequences of a few tokens, with prompts of several; weights with ties. `batched`: in twos, one padded."""
    rng = np.random.default_rng(seed)
    num_layers, num_experts = int(rng.integers(1, 4)), int(rng.integers(3, 8))
    top_k = int(rng.integers(1, min(num_experts, 3) + 1))
    count = int(rng.integers(1, 5))
    parts = [_sequence(rng, padded=batched) for _ in range(count)]
    step = np.concatenate([step for step, _ in parts])
    lengths = [len(step) for step, _ in parts]
    tokens = sum(lengths)
    extra: dict[str, Any] = {}
    if batched:
        firsts = np.cumsum([0, *(max(map(_passes, parts[s : s + 2])) for s in range(0, count, 2))])
        extra["forward"] = np.concatenate([firsts[s // 2] + step for s, (step, _) in enumerate(parts)]).astype(np.int64)
    if scores:
        extra["scores"] = rng.normal(size=(tokens, num_layers, num_experts)).astype(np.float16)
    weights = np.sort(rng.integers(0, 4, (tokens, num_layers, top_k)) / 4, axis=2)[:, :, ::-1]
    return Trace.from_arrays(
        np.argsort(rng.random((tokens, num_layers, num_experts)) ** 2 * np.arange(1, num_experts + 1), axis=2)[
            :, :, :top_k
        ],
        weights,
        np.cumsum([0, *lengths]),
        num_experts=num_experts,
        step=step,
        phase=np.concatenate([phase for _, phase in parts]),
        **extra,
    )


def _sequence(rng: np.random.Generator, *, padded: bool) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Steps and phases of one sequence."""
    prompt, decoded = int(rng.integers(0, 4)), int(rng.integers(1, 12))
    step = np.concatenate([np.zeros(prompt), np.arange(decoded) + (prompt > 0)]).astype(np.int32)
    phase = np.array([PREFILL] * prompt + [DECODE] * decoded, np.uint8)
    if padded and prompt > 1:
        phase[0] = PADDING
    return step, phase


def _passes(part: tuple[NDArray[np.int32], NDArray[np.uint8]]) -> int:
    return int(part[0][-1]) + 1
