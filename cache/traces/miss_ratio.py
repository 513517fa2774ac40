"""LRU's hit rate at every capacity, from one pass over a trace.

LRU is a stack policy: what a cache of C experts holds, a cache of C + 1 holds as well (Mattson et al., "Evaluation
techniques for storage hierarchies", 1970). So the depth at which an expert lies in the one stack of all experts,
ordered by last use, says at which capacities its use is a hit. For other policies `cache.counting` replays many
capacities side by side.

The stack moves once an event: all members are looked up against the state before it, then touched in ascending weight.
The first use of an expert is a miss at every capacity. Where an event needs more experts than fit, those touched last
stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.traces.passes import PassBlock, pass_blocks
from cache.traces.trace import Trace
from cache.types import RoutingEvent

_CHUNK_USES = 2**22  # expert uses whose sequences are worked on side by side


@dataclass(frozen=True)
class MissRatioCurve:
    """Hits at every capacity: `hits` int64 [layers, E + 1], the column is the number of experts a layer's cache holds.

    `accesses` is int64 [layers]. Where layers were not told apart, there is one row for all of them.
    """

    hits: NDArray[np.int64]
    accesses: NDArray[np.int64]

    @property
    def hit_rate(self) -> NDArray[np.float64]:
        """[E + 1]: hits / accesses of all layers together."""
        return np.asarray(self.hits.sum(0) / self.accesses.sum())


def lru_miss_ratio_curve(trace: Trace, *, cold: bool) -> MissRatioCurve:
    """LRU's hits on `trace`, for a cache of its own in every layer, at all capacities.

    `cold`: every sequence (a batch is one) starts with empty caches; else the first does, and they are kept.
    """
    num_layers, num_experts = trace.num_layers, trace.num_experts
    depths = np.zeros((num_layers, num_experts + 1), np.int64)
    chunks = _side_by_side(trace) if cold else ([block] for block in pass_blocks(trace))
    stacks = _Stacks(num_layers, num_experts)
    for blocks in chunks:
        if cold:
            stacks = _Stacks(num_layers * (int(max(_lane(blocks))) + 1), num_experts)
        depths += stacks.run(blocks, num_layers)
    return _curve(depths)


class RunningCurve:
    """The same of what is running, event by event; nothing is ever forgotten."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._stacks = _Stacks(num_layers, num_experts)
        self._depths = np.zeros((num_layers, num_experts + 1), np.int64)

    def observe(self, event: RoutingEvent) -> None:
        """Take note of what a layer uses."""
        experts = np.array(event.experts, np.int64)
        depths = self._stacks.touch(np.full(len(experts), event.layer), experts)
        self._depths[event.layer] += np.bincount(depths, minlength=self._depths.shape[1])

    @property
    def curve(self) -> MissRatioCurve:
        """LRU's hits so far at every capacity, had each layer had a cache of its own."""
        return _curve(self._depths)


def _curve(depths: NDArray[np.int64]) -> MissRatioCurve:
    """Of how many uses lay how deep, [layers, E + 1]; the last column counts first uses."""
    hits = np.zeros_like(depths)
    hits[:, 1:] = depths[:, :-1].cumsum(1)
    return MissRatioCurve(hits, depths.sum(1))


class _Stacks:
    """LRU stacks of many lanes, one for each layer (and sequence), moved together."""

    def __init__(self, lanes: int, num_experts: int) -> None:
        self._last = np.zeros((lanes, num_experts), np.int64)  # position among all uses, from 1; 0: never
        self._uses = 0
        self._num_experts = num_experts

    def run(self, blocks: list[PassBlock], num_layers: int) -> NDArray[np.int64]:
        """How many uses lay how deep, [layers, E + 1]; the last column counts first uses.

        The passes of one lane follow each other; the n-th passes of all lanes are one step.
        """
        lanes = np.repeat(_lane(blocks), [len(block.sequence) for block in blocks])
        first = np.flatnonzero(np.diff(lanes, prepend=-1))
        step = np.arange(len(lanes)) - np.repeat(first, np.diff(np.append(first, len(lanes))))
        sizes = np.concatenate([np.diff(block.uses.offsets) for block in blocks])  # [passes * layers]
        experts = np.concatenate([block.uses.experts for block in blocks])
        layer = np.tile(np.arange(num_layers), len(lanes))
        lane = np.repeat(np.repeat(lanes, num_layers) * num_layers + layer, sizes)
        # Sorting is stable: within a step, the uses of a lane stay in the order of their touching.
        order = np.argsort(np.repeat(np.repeat(step, num_layers), sizes), kind="stable")
        lane, experts = lane[order], experts[order]
        bounds = np.cumsum(np.bincount(np.repeat(step, num_layers), sizes).astype(np.int64))
        depths = np.empty(len(lane), np.int64)
        start = 0
        for end in bounds.tolist():
            depths[start:end] = self.touch(lane[start:end], experts[start:end])
            start = end
        cell = (lane % num_layers) * (self._num_experts + 1) + depths
        shape = num_layers, self._num_experts + 1
        return np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)

    def touch(self, lane: NDArray[np.int64], experts: NDArray[np.int64]) -> NDArray[np.int64]:
        """One event in each of some lanes: the depths of its members before it, E for a first use."""
        last = self._last[lane, experts]
        depth = np.count_nonzero(self._last[lane] > last[:, None], axis=1)
        self._last[lane, experts] = np.arange(self._uses + 1, self._uses + len(lane) + 1)
        self._uses += len(lane)
        return np.where(last, depth, self._num_experts)


def _lane(blocks: list[PassBlock]) -> NDArray[np.int64]:
    """For each block which lane it belongs to: blocks of one sequence (or batch) follow each other."""
    first = np.array([block.sequence[0] for block in blocks])
    return np.cumsum(np.diff(first, prepend=first[0]) != 0)


def _side_by_side(trace: Trace) -> Iterator[list[PassBlock]]:
    """The passes of whole sequences, as many as are worth working on together."""
    blocks: list[PassBlock] = []
    uses = 0
    for block in pass_blocks(trace):
        if uses >= _CHUNK_USES and block.sequence[0] != blocks[-1].sequence[0]:
            yield blocks
            blocks, uses = [], 0
        blocks.append(block)
        uses += len(block.uses.experts)
    yield blocks
