"""What claims are measured on: recorded routing, held-out parts of it, batches, and tasks that come again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.traces.trace import DECODE, PER_TOKEN, Trace
from offload.costs.machine import MachineProfile

EXPERT_BYTES = 13_288_320
"""What an expert is taken to have in every replay: gpt-oss-20b's. Small models' would cost nothing but calls."""


@dataclass(frozen=True, eq=False)
class Workload:
    """A trace by a short `name`, of at most `tokens` tokens; parts of it that others learn from go to `folder`."""

    name: str
    path: Path
    folder: Path
    machine: MachineProfile
    tokens: int = 6000

    @cached_property
    def whole(self) -> Trace:
        """All that is used of it: sequences evenly chosen, at least two."""
        trace = Trace.open(self.path)
        mean = trace.num_tokens / trace.num_sequences
        count = min(trace.num_sequences, max(2, round(self.tokens / mean)))
        return trace.select([i * trace.num_sequences // count for i in range(count)])

    @cached_property
    def learnt(self) -> Path:
        """Where every second sequence is, from the first on: what learns may learn from it."""
        return self._written("learnt", self.whole.select(range(0, self.whole.num_sequences, 2)))

    @cached_property
    def held_out(self) -> Trace:
        """The others."""
        return self.whole.select(range(1, self.whole.num_sequences, 2))

    @cached_property
    def replies(self) -> Trace:
        """The held-out sequences without what is read at once."""
        return only_decoding(self.held_out)

    @cached_property
    def begun(self) -> Path:
        """Where the first half of every sequence is."""
        return self._written("begun", part(self.whole, 0.0, 0.5))

    @cached_property
    def gone_on(self) -> Trace:
        """The second half of every sequence: the same tasks come again."""
        return part(self.whole, 0.5, 1.0)

    def _written(self, name: str, trace: Trace) -> Path:
        path = self.folder / f"{self.name}-{name}.safetensors"
        trace.write(path)
        return path


def part(trace: Trace, first: float, last: float) -> Trace:
    """Of every sequence the tokens from the share `first` to `last`."""
    spans = [
        (start + round(first * (end - start)), start + round(last * (end - start)))
        for start, end in zip(trace.sequence_offsets[:-1], trace.sequence_offsets[1:], strict=True)
    ]
    rows = np.concatenate([np.arange(*span) for span in spans])
    return _rows(trace, rows, np.cumsum([0, *(end - start for start, end in spans)]))


def only_decoding(trace: Trace) -> Trace:
    """The tokens that are decoded."""
    keep = trace.phase == DECODE
    owner = np.repeat(np.arange(trace.num_sequences), np.diff(trace.sequence_offsets))
    counts = np.bincount(owner[keep], minlength=trace.num_sequences)
    return _rows(trace, np.flatnonzero(keep), np.cumsum([0, *counts[counts > 0]]))


def batched(trace: Trace, size: int, order: Sequence[int] | None = None) -> Trace:
    """The sequences `size` at a time as batches, that go step by step together; in the given `order`."""
    chosen = list(range(trace.num_sequences)) if order is None else list(order)
    trace = trace.select(chosen[: len(chosen) // size * size] or chosen)
    forward = np.zeros(trace.num_tokens, np.int64)
    base = 0
    for first in range(0, trace.num_sequences, size):
        highest = base
        for sequence in range(first, min(first + size, trace.num_sequences)):
            rows = slice(*trace.sequence_offsets[sequence : sequence + 2])
            steps = trace.step[rows].astype(np.int64)
            forward[rows] = base + steps - steps[0]
            highest = max(highest, int(forward[rows].max()))
        base = highest + 1
    return replace(trace, forward=forward)


def _rows(trace: Trace, rows: NDArray[np.intp], offsets: NDArray[np.int64]) -> Trace:
    kept = {name: getattr(trace, name) for name in PER_TOKEN}
    arrays = {name: array[rows] for name, array in kept.items() if array is not None}
    return replace(trace, sequence_offsets=offsets, **arrays)
