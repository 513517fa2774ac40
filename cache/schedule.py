"""A trace laid out for many lanes: what a replay's policies are touched with, step by step.

A unit is what one cache lives through: a sequence (or the sequences of one batch), if a replay is cold, else the whole
trace. Units run side by side, the longest first: at step t every unit that has a forward pass t takes it, so that those
still running are always the first ones, and their lanes a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache.lanes import Future, Ints, Touch
from cache.passes import batches, decodes, mapped, running_order, uses_of
from cache.trace import Trace

MAX_LANES = 4096
"""Lanes side by side: enough that NumPy's cost of a call does not count, few enough that their state stays cached."""
_BLOCK_PASSES = 4096


@dataclass(frozen=True, slots=True)
class _Unit:
    rows: Ints
    """Tokens of the trace, in running order."""
    starts: Ints
    """Where in `rows` each forward pass starts; one more for the end."""
    sequences: Ints
    """The passes with which a sequence begins."""

    @classmethod
    def of(cls, parts: Sequence[tuple[Ints, Ints]]) -> _Unit:
        """Sequences one after the other, each as its tokens and where its passes start."""
        sizes = np.cumsum([0, *(len(rows) for rows, _ in parts)])
        starts = [first + start for first, (_, start) in zip(sizes, parts, strict=False)]
        passes = np.cumsum([0, *(len(start) for _, start in parts)])
        rows = np.concatenate([rows for rows, _ in parts])
        return cls(rows, np.concatenate([*starts, sizes[-1:]]), passes[:-1])


class Schedule:
    """`trace` for caches of one layer each (`pool` "layer") or one of all layers ("global"), cold or warm."""

    def __init__(self, trace: Trace, *, pool: str, cold: bool) -> None:
        self.trace = trace
        self.layers_per_lane = 1 if pool == "layer" else trace.num_layers
        parts = [running_order(trace, group) for group in batches(trace, np.arange(trace.num_sequences))]
        units = [_Unit.of([part]) for part in parts] if cold else [_Unit.of(parts)]
        self._units = sorted(units, key=lambda unit: -len(unit.starts))

    def chunks(self) -> Iterator[Chunk]:
        """The units in groups of a bounded number of lanes."""
        lanes_each = self.trace.num_layers // self.layers_per_lane
        size = max(1, MAX_LANES // lanes_each)
        for first in range(0, len(self._units), size):
            yield Chunk(self.trace, self._units[first : first + size], self.layers_per_lane)


class Chunk(Future):
    """Some units of a schedule, run side by side from their first pass to the last of the longest."""

    def __init__(self, trace: Trace, units: list[_Unit], layers_per_lane: int) -> None:
        self.units = len(units)
        self._trace = trace
        self._by_layer = layers_per_lane < trace.num_layers
        self._rows = np.concatenate([unit.rows for unit in units])
        bases = np.cumsum([0, *(len(unit.rows) for unit in units)])
        lengths = np.array([len(unit.starts) - 1 for unit in units])
        passes = int(lengths[0])
        # [units, passes + 1], the last start repeated: a pass that a unit does not have is empty.
        self._starts = np.stack(
            [
                base + unit.starts[np.minimum(np.arange(passes + 1), n)]
                for base, unit, n in zip(bases, units, lengths, strict=False)
            ]
        )
        self._running = np.searchsorted(-lengths, -np.arange(passes), "left")  # units that have pass t
        self._begins = np.isin(np.arange(passes), np.concatenate([unit.sequences for unit in units]))
        self._block_of = (np.cumsum(self._running) - 1) // _BLOCK_PASSES
        self._loaded = -1
        self.times = passes if self._by_layer else passes * trace.num_layers

    def touches(self) -> Iterator[tuple[Touch, Ints | None]]:
        """Every event in order: a touch, and each lane's number of members where it is not K for all."""
        for time in range(self.times):
            yield self._touch(time)

    def at(self, time: int) -> Ints:
        """See `Future`."""
        return self._touch(time)[0].at

    def _touch(self, time: int) -> tuple[Touch, Ints | None]:
        trace, num_layers, num_experts = self._trace, self._trace.num_layers, self._trace.num_experts
        step, layer = (time, 0) if self._by_layer else divmod(time, num_layers)
        if self._block_of[step] != self._loaded:
            self._load(int(self._block_of[step]))
        first = self._first[step - self._first_step] * num_layers
        last = first + self._running[step] * num_layers
        events = slice(first, last, 1 if self._by_layer else num_layers)
        if not self._by_layer:
            events = slice(first + layer, last, num_layers)
        uses = self._uses
        sizes = None
        if self._regular:
            which: Any = events
            experts, weights, tokens = (
                array.reshape(-1, trace.top_k)[which] for array in (uses.experts, uses.weights, uses.tokens)
            )
        else:
            sizes = np.diff(uses.offsets)[events]
            top = sizes.max()
            which = uses.offsets[:-1][events][:, None] + np.maximum(np.arange(top) - (top - sizes[:, None]), 0)
            experts, weights, tokens = uses.experts[which], uses.weights[which], uses.tokens[which]
        width = num_experts if self._by_layer else num_layers * num_experts
        start = layer * num_experts
        return (
            Touch(
                lanes=slice(0, len(experts)),
                columns=slice(start, start + num_experts),
                at=experts + (np.arange(len(experts)) * width + start)[:, None],
                experts=experts,
                weights=weights,
                tokens=tokens,
                decode=self._decode[events],
                scores=None if uses.scores is None else uses.scores.reshape(-1, num_experts)[events],
                new_pass=layer == 0,
                new_sequence=layer == 0 and bool(self._begins[step]),
                time=time,
            ),
            sizes,
        )

    def _load(self, block: int) -> None:
        """Make the events of some steps, for all units: step after step, and in each unit after unit."""
        steps = np.flatnonzero(self._block_of == block)
        self._first_step = int(steps[0])
        running = self._running[steps]
        has = np.arange(self.units)[:, None] < running  # [units, steps]
        begin = self._starts[:, steps].T[has.T]
        sizes = self._starts[:, steps + 1].T[has.T] - begin
        ends = np.cumsum(sizes)
        rows = self._rows[np.arange(ends[-1]) + np.repeat(begin - (ends - sizes), sizes)]
        first_rows = rows[ends - sizes]
        decode = decodes(self._trace.phase[mapped(rows)], sizes, self._trace.step[first_rows])
        self._uses = uses_of(self._trace, rows, sizes)
        self._decode = decode.repeat(self._trace.num_layers)
        self._first = np.cumsum(running) - running
        self._regular = bool(np.all(np.diff(self._uses.offsets) == self._trace.top_k))
        self._loaded = block
