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
from numpy.typing import NDArray

from cache.errors import TraceError
from cache.lanes import Future, Ints, Touch
from cache.traces.by_token import ByToken
from cache.traces.passes import batches, decodes, mapped, routing_events, running_order, uses_of
from cache.traces.trace import Trace
from cache.types import RoutingEvent

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


def _units(trace: Trace, cold: bool) -> list[tuple[_Unit, Ints]]:
    """The units in running order, each with its sequences."""
    groups = list(batches(trace, np.arange(trace.num_sequences)))
    parts = [running_order(trace, group) for group in groups]
    if cold:
        return [(_Unit.of([part]), group) for part, group in zip(parts, groups, strict=True)]
    return [(_Unit.of(parts), np.arange(trace.num_sequences))]


def runs(
    trace: Trace, *, cold: bool, by_token: ByToken | None = None
) -> Iterator[tuple[Iterator[RoutingEvent], Future]]:
    """`trace` for one model at a time, event after event: what happens in each unit, and the same known beforehand.

    `by_token` is what a rule asks of every token. The future goes to policies that are not causal, whatever their
    lanes, after the reset with which a unit begins.
    """
    for unit, sequences in _units(trace, cold):
        yield routing_events(trace, sequences, by_token), Chunk(trace, [unit], trace.num_layers, by_token)


def warm_up_passes(trace: Trace, sequences: int) -> int:
    """The forward passes of the first `sequences` in running order, and of those that ran in batches with them.

    Raises TraceError if none is left after them.
    """
    passes = begun = 0
    for group in batches(trace, np.arange(trace.num_sequences)):
        if begun >= sequences:
            break
        begun += len(group)
        passes += len(running_order(trace, group)[1])
    if sequences and begun == trace.num_sequences:
        raise TraceError(f"--warm-up {sequences}: {trace.name} has {begun} sequences, and none is left to count")
    return passes


class Schedule:
    """`trace` for caches of one layer each (`pool` "layer") or one of all layers ("global"), cold or warm."""

    def __init__(self, trace: Trace, *, pool: str, cold: bool, copies: int = 1) -> None:
        """`copies`: how many times each unit runs, side by side."""
        self.trace = trace
        self.layers_per_lane = 1 if pool == "layer" else trace.num_layers
        self._copies = copies
        units = sorted((unit for unit, _ in _units(trace, cold)), key=lambda unit: -len(unit.starts))
        self._units = [unit for unit in units for _ in range(copies)]

    def chunks(self) -> Iterator[Chunk]:
        """The units in groups of a bounded number of lanes; all copies of a unit are in the same."""
        lanes_each = self.trace.num_layers // self.layers_per_lane * self._copies
        size = max(1, MAX_LANES // lanes_each) * self._copies
        for first in range(0, len(self._units), size):
            yield Chunk(self.trace, self._units[first : first + size], self.layers_per_lane)


@dataclass(frozen=True, slots=True)
class _Block:
    """The uses of some consecutive steps: step after step, in each unit after unit, then layer after layer."""

    first_step: int
    first: Ints
    """Of each step: which of the block's passes is its first."""
    experts: Ints
    """[events, K], or [uses] where not every event has K."""
    weights: NDArray[np.float64]
    tokens: Ints
    decode: NDArray[np.bool_]
    """[events]."""
    scores: NDArray[np.float32] | None
    """[events, E]."""
    offsets: Ints | None
    """[events + 1]: where in the uses each event starts, where not every event has K."""

    def members(self, events: slice) -> tuple[Any, Ints | None]:
        """Where in the uses the members of `events` are, [N, K], and how many each has where that is not K for all."""
        if self.offsets is None:
            return events, None
        starts, sizes = self.offsets[:-1][events], np.diff(self.offsets)[events]
        top = sizes.max()
        return starts[:, None] + np.maximum(np.arange(top) - (top - sizes[:, None]), 0), sizes


class Chunk(Future):
    """Some units of a schedule, run side by side from their first pass to the last of the longest."""

    def __init__(self, trace: Trace, units: list[_Unit], layers_per_lane: int, by_token: ByToken | None = None) -> None:
        self.units = len(units)
        self._by_token = by_token
        self._trace = trace
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
        # Two, the latest asked for last: the replay reads one, and a policy that looks ahead perhaps the next.
        self._blocks: dict[int, _Block] = {}
        self.times_per_pass = 1 if layers_per_lane < trace.num_layers else trace.num_layers
        self.times = passes * self.times_per_pass

    def touches(self) -> Iterator[Touch]:
        """Every event in order."""
        for time in range(self.times):
            yield self._touch(time)

    def at(self, time: int) -> Ints:
        """See `Future`."""
        block, events, layer = self._find(time)
        return self._flat(block.experts[block.members(events)[0]], layer)

    def _touch(self, time: int) -> Touch:
        block, events, layer = self._find(time)
        which, sizes = block.members(events)
        experts = block.experts[which]
        start = layer * self._trace.num_experts
        return Touch(
            slice(0, len(experts)),
            slice(start, start + self._trace.num_experts),
            self._flat(experts, layer),
            experts,
            block.weights[which],
            block.tokens[which],
            block.decode[events],
            sizes=sizes,
            scores=None if block.scores is None else block.scores[events],
            new_pass=layer == 0,
            new_sequence=layer == 0 and bool(self._begins[time // self.times_per_pass]),
            time=time,
        )

    def _find(self, time: int) -> tuple[_Block, slice, int]:
        """The events at `time`, one a lane: their block, their places there, and their layer in the lane."""
        step, layer = divmod(time, self.times_per_pass)
        index = int(self._block_of[step])
        block = self._blocks.pop(index, None) or self._load(index)
        self._blocks[index] = block
        if len(self._blocks) > 2:
            del self._blocks[next(iter(self._blocks))]
        first = int(block.first[step - block.first_step]) * self._trace.num_layers
        last = first + int(self._running[step]) * self._trace.num_layers
        return block, slice(first + layer, last, self.times_per_pass), layer

    def _flat(self, experts: Ints, layer: int) -> Ints:
        """`experts` [N, K] of a layer as `Touch.at`."""
        width = self._trace.num_experts * self.times_per_pass
        starts = np.arange(len(experts)) * width + layer * self._trace.num_experts
        flat: Ints = experts + starts[:, None]
        return flat

    def _load(self, block: int) -> _Block:
        """Make the events of some steps, for all units."""
        steps = np.flatnonzero(self._block_of == block)
        running = self._running[steps]
        has = np.arange(self.units)[:, None] < running  # [units, steps]
        begin = self._starts[:, steps].T[has.T]
        sizes = self._starts[:, steps + 1].T[has.T] - begin
        ends = np.cumsum(sizes)
        rows = self._rows[np.arange(ends[-1]) + np.repeat(begin - (ends - sizes), sizes)]
        decode = decodes(self._trace.phase[mapped(rows)], sizes, self._trace.step[rows[ends - sizes]])
        uses = uses_of(self._trace, rows, sizes, decode, self._by_token)
        regular = bool(np.all(np.diff(uses.offsets) == self._trace.top_k))
        shape = (-1, self._trace.top_k) if regular else (-1,)
        return _Block(
            first_step=int(steps[0]),
            first=np.cumsum(running) - running,
            experts=uses.experts.reshape(shape),
            weights=uses.weights.reshape(shape),
            tokens=uses.tokens.reshape(shape),
            decode=decode.repeat(self._trace.num_layers),
            scores=None if uses.scores is None else uses.scores.reshape(-1, self._trace.num_experts),
            offsets=None if regular else uses.offsets,
        )
