"""A trace made for replays of presets."""

from __future__ import annotations

import numpy as np

from cache.traces.trace import Trace
from tests.cache.machines import MB

SIZE = 10 * MB


def make_trace(tokens: int = 40, sequences: int = 3, seed: int = 0) -> Trace:
    """Sticky routing with what the gates said ahead: 4 layers, top-2 of 8."""
    rng = np.random.default_rng(seed)
    count = tokens * sequences
    experts = np.zeros((count, 4, 2), np.uint8)
    for token in range(count):
        for layer in range(4):
            again = token % tokens and rng.random() < 0.5
            experts[token, layer] = experts[token - 1, layer] if again else rng.choice(8, 2, replace=False)
    ahead = np.stack([np.roll(experts, -distance, axis=1) for distance in (1, 2, 3)], axis=2)
    weights = np.tile(np.array([0.7, 0.3], np.float32), (count, 4, 1))
    return Trace.from_arrays(
        experts,
        weights,
        np.arange(0, count + 1, tokens),
        num_experts=8,
        metadata={"expert_bytes": str(SIZE), "dtype": "bfloat16"},
        predicted=ahead,
    )
