"""A trace laid out for many lanes: what a replay's policies are touched with, step by step.

A unit is what one cache lives through: a sequence (or the sequences of one batch), if a replay is cold, else the whole
trace. Units run side by side, the longest first: at step t every unit that has a forward pass t takes it, so that those
still running are always the first ones, and their lanes a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Future, Ints, Touch
from cache.passes import PassBlock, block_of, running_order
from cache.trace import Trace

MAX_LANES = 4096
"""Lanes side by side: enough that NumPy's cost of a call does not count, few enough that their state stays cached."""
_BLOCK_PASSES = 4096


@dataclass(frozen=True, slots=True)
class _Unit:
    rows: Ints  # tokens of the trace, in running order
    starts: Ints  # where in `rows` each forward pass starts; one more for the end
    sequences: Ints  # passes with which a sequence begins


class Schedule:
    """`trace` for caches of one layer each (`pool` "layer") or one of all layers ("global"), cold or warm.

    `sequences` picks some of the trace's.
    """

    def __init__(self, trace: Trace, *, pool: str, cold: bool, sequences: list[int] | None = None) -> None:
        self.trace = trace
        self.layers_per_lane = 1 if pool == "layer" else trace.num_layers
        units = [_unit([order]) for order in running_order(trace, sequences)]
        if not cold:
            units = [_unit([(unit.rows, unit.starts[:-1]) for unit in units])]
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
        self._units = units
        self._layers_per_lane = layers_per_lane
        self._shared = layers_per_lane > 1 or trace.num_layers == 1
        lengths = np.array([len(unit.starts) - 1 for unit in units])
        self.passes = int(lengths[0])
        """Of the longest unit."""
        self._running = np.searchsorted(-lengths, -np.arange(self.passes), "left")  # units that have pass t
        self._begins = set(np.unique(np.concatenate([unit.sequences for unit in units])).tolist())
        self.times = self.passes * (1 if layers_per_lane == 1 else trace.num_layers)
        self._block: tuple[int, int] = (0, 0)
        self._blocks: PassBlock | None = None

    def touches(self) -> Iterator[tuple[Touch, Ints | None]]:
        """Every event in order: a touch, and each lane's number of members where it is not K for all."""
        for time in range(self.times):
            yield self._touch(time)

    def at(self, time: int) -> Ints:
        """See `Future`."""
        return self._touch(time)[0].at
