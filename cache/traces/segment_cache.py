"""SCH, the segment cache best hit rate of "Not All Models Suit Expert Offloading" (arXiv:2505.16056).

The hit rate of a cache that knows the experts of the next m tokens and evicts the one that fewest of them use, of
equals the one that was not used for longest. As in the authors' code: all experts of a token are looked up before any
of them moves; then each is admitted in turn, and no longer counts the present token among its uses; a first use is a
hit while the cache has not been filled. Caches are of rho * K experts, one for each layer, or one pool of rho * K * L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.errors import TraceError
from cache.traces.locality import SEGMENT_LENGTHS, real_tokens
from cache.traces.trace import PADDING, Trace

RATIOS = (1, 2, 3)
_USE = 2**32  # one use in the window outranks any time of last use


@dataclass(frozen=True)
class SegmentCache:
    """Hits int64 [lengths, ratios, groups] and accesses int64 [groups]; a group is a layer, or the pool of all."""

    lengths: tuple[int, ...]
    ratios: tuple[int, ...]
    sequences: int
    hits: NDArray[np.int64]
    accesses: NDArray[np.int64]

    @property
    def hit_rate(self) -> NDArray[np.float64]:
        """SCH [lengths, ratios], of all groups together."""
        return np.asarray(self.hits.sum(-1) / self.accesses.sum())


def segment_cache(
    trace: Trace,
    *,
    lengths: Sequence[int] = SEGMENT_LENGTHS,
    ratios: Sequence[int] = RATIOS,
    every: int = 16,
    pooled: bool = False,
) -> SegmentCache:
    """SCH for segments of `lengths` tokens and caches of `ratios` times K experts, over every `every`-th sequence.

    `pooled`: one cache for all layers, where an event is one token in all of them. Raises TraceError if the sequences
    chosen are nothing but padding.
    """
    chosen = [tokens for s in range(0, trace.num_sequences, every) if len(tokens := _touched(trace, s))]
    if not chosen:
        raise TraceError(f"{trace.name}: every {every}th sequence is nothing but padding")
    chosen.sort(key=len, reverse=True)
    num_experts = trace.num_experts
    if pooled:
        offset = np.arange(trace.num_layers)[:, None] * num_experts
        chosen = [(tokens + offset).reshape(len(tokens), 1, -1) for tokens in chosen]
        num_experts *= trace.num_layers
    width = chosen[0].shape[2]
    state = _Caches(len(chosen), chosen[0].shape[1], num_experts, lengths, [ratio * width for ratio in ratios])
    ends = np.array([len(tokens) for tokens in chosen])
    padded = np.zeros((ends[0], len(chosen), *chosen[0].shape[1:]), np.int64)
    for sequence, tokens in enumerate(chosen):
        padded[: len(tokens), sequence] = tokens
    for ahead in range(max(lengths)):
        state.expect(padded, ends, ahead, [length > ahead for length in lengths])
    for now in range(ends[0]):
        state.use(padded[now, : np.count_nonzero(ends > now)])
        for index, length in enumerate(lengths):
            state.expect(padded, ends, now + length, [i == index for i in range(len(lengths))])
    accesses = np.full(chosen[0].shape[1], int(ends.sum()) * width)
    return SegmentCache(tuple(lengths), tuple(ratios), len(chosen), state.hits, accesses)


class _Caches:
    """A cache for every length m, capacity c, sequence s and group g, moved together.

    `worth` [m, s, g, E] is uses in the window * 2**32 + time of last use; `held` [m, c, s, g, E].
    """

    def __init__(
        self, sequences: int, groups: int, experts: int, lengths: Sequence[int], capacities: Sequence[int]
    ) -> None:
        self.hits = np.zeros((len(lengths), len(capacities), groups), np.int64)
        self._worth = np.zeros((len(lengths), sequences, groups, experts), np.int64)
        self._held = np.zeros((len(lengths), len(capacities), sequences, groups, experts), bool)
        self._seen = np.zeros((sequences, groups), np.int64)  # different experts so far
        self._capacities = np.array(capacities)[:, None, None]
        self._time = 0

    def expect(self, tokens: NDArray[np.int64], ends: NDArray[np.int64], when: int, which: Sequence[bool]) -> None:
        """The window of the lengths in `which` reaches token `when`."""
        going = np.count_nonzero(ends > when)
        if not going:
            return
        experts = tokens[when, :going]
        s, g = np.ogrid[:going, : experts.shape[1]]
        for m in np.flatnonzero(which):
            self._worth[m, s[..., None], g[..., None], experts] += _USE

    def use(self, experts: NDArray[np.int64]) -> None:
        """One token of the first sequences: `experts` [sequences, groups, members] in the order of their touching."""
        going, groups, members = experts.shape
        s, g = np.ogrid[:going, :groups]
        held, worth, seen = self._held[:, :, :going], self._worth[:, :going], self._seen[:going]
        hit = held[:, :, s[..., None], g[..., None], experts]
        new = worth[0, s[..., None], g[..., None], experts] % _USE == 0
        # The n-th expert ever fits without evicting anything while n <= C.
        nth = seen[..., None] + new.cumsum(-1)
        hit |= new & (nth <= self._capacities[..., None])
        self.hits += hit.sum((2, 4))
        for member in range(members):
            expert = experts[..., member]
            missing = ~held[:, :, s, g, expert]
            full = np.where(new[..., member], nth[..., member] - 1, self._capacities.max()) >= self._capacities
            self._evict(held, worth, missing & full)
            held[:, :, s, g, expert] = True
            self._time += 1
            uses = worth[:, s, g, expert] // _USE - 1
            worth[:, s, g, expert] = uses * _USE + self._time
        seen += new.sum(-1)

    @staticmethod
    def _evict(held: NDArray[np.bool_], worth: NDArray[np.int64], where: NDArray[np.bool_]) -> None:
        """In each cache of `where` [m, c, s, g], drop the expert that is worth least."""
        m, c, s, g = np.nonzero(where)
        if len(m):
            candidates = np.where(held[m, c, s, g], worth[m, s, g], np.iinfo(np.int64).max)
            held[m, c, s, g, candidates.argmin(-1)] = False


def _touched(trace: Trace, sequence: int) -> NDArray[np.int64]:
    """The experts of a sequence's tokens without padding, [n, L, K], by ascending weight, ties by id."""
    start, end = trace.sequence_offsets[sequence : sequence + 2].tolist()
    weights = trace.weights[start:end][trace.phase[start:end] != PADDING]
    experts = real_tokens(trace, sequence).astype(np.int64)
    return np.take_along_axis(experts, np.lexsort((experts, weights), axis=-1), -1)
