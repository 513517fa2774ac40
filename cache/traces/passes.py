"""A trace as what the runtime saw: forward passes, and in each of them one routing event a layer.

The tokens of a pass, of all its sequences, are one event: the set of experts they need together. Events come out as the
live runtime makes them: experts by ascending total weight, ties by id; a total is the sum over the event's tokens,
sequence after sequence, added up one by one in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.trace import DECODE, PREFILL, Trace
from cache.types import Opening, Phase, RoutingEvent

Ahead = tuple[tuple[int, ...], ...]

_BLOCK_CELLS = 2**20  # (pass, layer, expert) in one block
_BLOCK_USES = 2**18  # (token, layer, k) in one block, as far as one pass has no more


@dataclass(frozen=True, slots=True)
class Uses:
    """What P forward passes of L layers need: N experts, all P * L events together.

    Event (p, l) needs `experts[offsets[p * L + l] : offsets[p * L + l + 1]]`, in the order in which they are touched.
    """

    offsets: NDArray[np.int64]
    """[P * L + 1]."""
    experts: NDArray[np.int64]
    """[N]: ids by ascending total weight, ties by id."""
    weights: NDArray[np.float64]
    """[N]: total router weight."""
    tokens: NDArray[np.int64]
    """[N]: how many tokens go to the expert."""
    scores: NDArray[np.float32] | None
    """[P, L, E]: the router's scores averaged over a pass's tokens, where the trace has them."""


@dataclass(frozen=True, slots=True)
class PassBlock:
    """P consecutive forward passes."""

    sequence: NDArray[np.int64]
    """[P]: the pass's sequence; of a batch the first."""
    step: NDArray[np.int64]
    """[P]: the pass within the sequence; in a batch, within the batch."""
    decode: NDArray[np.bool_]
    """[P]: whether it continues, rather than reads a prompt."""
    uses: Uses
    ahead: Callable[[int, int], Ahead] | None
    """What was said ahead at (pass, layer), as `RoutingEvent.ahead`, where the trace has predictions."""
    opening: Callable[[int], Opening] | None = None
    """What a pass reads, where the trace has its tokens."""


def routing_events(trace: Trace, sequences: Iterable[int] | None = None) -> Iterator[RoutingEvent]:
    """One event for every forward pass and layer, in running order: those the live runtime made.

    Padding tokens count, since they are routed as well. A batch is one event, known by its first sequence.
    `sequences` is as in `pass_blocks`.
    """
    layers = range(trace.num_layers)
    for block in pass_blocks(trace, sequences):
        uses = block.uses
        experts, weights, tokens = (tuple(each.tolist()) for each in (uses.experts, uses.weights, uses.tokens))
        ends = iter(uses.offsets[1:].tolist())
        start = 0
        passes = zip(block.sequence.tolist(), block.step.tolist(), block.decode.tolist(), strict=True)
        for index, (sequence, step, decode) in enumerate(passes):
            phase = Phase.DECODE if decode else Phase.PREFILL
            for layer in layers:
                end = next(ends)
                yield RoutingEvent(
                    sequence,
                    step,
                    layer,
                    phase,
                    experts[start:end],
                    weights[start:end],
                    tokens[start:end],
                    () if block.ahead is None else block.ahead(index, layer),
                    None if layer or block.opening is None else block.opening(index),
                    None if uses.scores is None else uses.scores[index, layer],
                )
                start = end


def pass_blocks(trace: Trace, sequences: Iterable[int] | None = None) -> Iterator[PassBlock]:
    """The trace as forward passes, in running order, many at a time: for what works on arrays.

    `sequences` picks some; of a pass that others took part in, their tokens alone are left. Raises TraceError for one
    that the trace does not have.
    """
    chosen = np.arange(trace.num_sequences) if sequences is None else np.unique(trace.existing(sequences))
    uses = max(1, _BLOCK_USES // (trace.num_layers * trace.top_k))
    cells = max(1, _BLOCK_CELLS // (trace.num_layers * trace.num_experts))
    for group in batches(trace, chosen):
        tokens, starts = running_order(trace, group)
        ends = np.append(starts[1:], len(tokens))
        first = 0
        while first < len(starts):
            last = int(np.searchsorted(ends, starts[first] + uses, "right"))
            last = min(max(last, first + 1), first + cells)
            yield _block(trace, group, tokens, starts, ends, slice(first, min(last, len(starts))))
            first = last


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


def batches(trace: Trace, chosen: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The chosen sequences in running order, those that share forward passes together."""
    if trace.forward is None or not chosen.size:
        yield from chosen[:, None]
        return
    first = trace.forward[trace.sequence_offsets[chosen]]
    last = trace.forward[trace.sequence_offsets[chosen + 1] - 1]
    order = np.argsort(first, kind="stable")
    reached = np.maximum.accumulate(last[order])
    breaks = np.flatnonzero(first[order][1:] > reached[:-1]) + 1
    for group in np.split(chosen[order], breaks):
        yield np.sort(group)


def running_order(trace: Trace, group: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens of `group` pass after pass, and where in that order each pass starts."""
    offsets = trace.sequence_offsets
    tokens = np.concatenate([np.arange(offsets[s], offsets[s + 1]) for s in group])
    if trace.forward is None:
        passes: NDArray[Any] = trace.step[offsets[group[0]] : offsets[group[0] + 1]]
    else:
        passes = trace.forward[tokens]
        order = np.argsort(passes, kind="stable")
        tokens, passes = tokens[order], passes[order]
    return tokens, np.flatnonzero(np.diff(passes, prepend=-1))


def _block(
    trace: Trace,
    group: NDArray[np.int64],
    tokens: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    chosen: slice,
) -> PassBlock:
    sizes = ends[chosen] - starts[chosen]
    rows = tokens[starts[chosen][0] : ends[chosen][-1]]
    first_rows = rows[np.cumsum(sizes) - sizes]
    alone = len(group) == 1
    return PassBlock(
        sequence=np.full(len(sizes), group[0]),
        step=trace.step[first_rows].astype(np.int64) if alone else np.arange(len(starts))[chosen],
        decode=decodes(trace.phase[mapped(rows)], sizes, trace.step[first_rows]),
        uses=uses_of(trace, rows, sizes),
        ahead=None if trace.predicted is None else _ahead_of(trace, rows, sizes),
        opening=None if trace.ids is None else _openings(trace, trace.ids, rows, sizes),
    )


def uses_of(trace: Trace, rows: NDArray[np.int64], sizes: NDArray[np.int64]) -> Uses:
    """What the forward passes made of the tokens `rows` use: the first `sizes[0]` of them are one pass, and so on."""
    where = mapped(rows)
    if len(rows) == len(sizes):
        return _uses_of_single_tokens(trace, where)
    num_passes, num_experts = len(sizes), trace.num_experts
    event = np.repeat(np.arange(num_passes), sizes)[:, None] * trace.num_layers + np.arange(trace.num_layers)
    cell = (event[:, :, None] * num_experts + trace.experts[where]).ravel()  # of [rows, L, K]
    cells = num_passes * trace.num_layers * num_experts
    # bincount adds one by one, in order: so does the live runtime.
    totals = np.bincount(cell, trace.weights[where].ravel(), cells).astype(np.float64, copy=False)
    counts = np.bincount(cell, minlength=cells)
    needed = np.flatnonzero(counts)
    event_of, expert = np.divmod(needed, num_experts)
    order = np.lexsort((totals[needed], event_of))  # stable, and ids ascend: equal totals stay in order of id
    needed = needed[order]
    offsets = np.searchsorted(event_of, np.arange(num_passes * trace.num_layers + 1))
    scores = None if trace.scores is None else mean_scores(trace.scores[where], sizes)
    return Uses(offsets, expert[order], totals[needed], counts[needed], scores)


def _uses_of_single_tokens(trace: Trace, where: Any) -> Uses:
    """The same where every pass is one token: nothing to add up, K members each, sorted as one integer."""
    weights = trace.weights[where].astype(np.float32) + np.float32(0)  # -0.0 becomes 0.0
    bits = weights.view(np.int32).astype(np.int64)
    ascending = bits ^ ((bits >> 63) & 0x7FFFFFFF)  # floats order as these do
    keys = (ascending << 16) | trace.experts[where]
    keys.sort(axis=-1)
    bits = keys >> 16
    weights = (bits ^ ((bits >> 63) & 0x7FFFFFFF)).astype(np.int32).view(np.float32)
    count = keys.size
    offsets = np.arange(0, count + 1, trace.top_k)
    scores = None if trace.scores is None else trace.scores[where].astype(np.float32)
    return Uses(offsets, (keys & 0xFFFF).ravel(), weights.ravel().astype(np.float64), np.ones(count, np.int64), scores)


def _ahead_of(trace: Trace, rows: NDArray[np.int64], sizes: NDArray[np.int64]) -> Callable[[int, int], Ahead]:
    predicted = trace.predicted
    assert predicted is not None
    ends = np.cumsum(sizes)

    def ahead(index: int, layer: int) -> Ahead:
        distances = min(predicted.shape[2], trace.num_layers - 1 - layer)
        tokens = rows[ends[index] - sizes[index] : ends[index]]
        return rank_ahead(predicted[tokens, layer, :distances])

    return ahead


def _openings(
    trace: Trace, ids: NDArray[np.int32], rows: NDArray[np.int64], sizes: NDArray[np.int64]
) -> Callable[[int], Opening]:
    where = mapped(rows)
    read = ids[where].tolist()
    ends = np.cumsum(sizes).tolist()
    means = None if trace.embeddings is None else mean_scores(trace.embeddings[where], sizes)

    def opening(index: int) -> Opening:
        first = ends[index] - int(sizes[index])
        return Opening(tuple(read[first : ends[index]]), None if means is None else means[index])

    return opening


def rank_ahead(predicted: NDArray[np.integer[Any]]) -> Ahead:
    """What a pass's tokens say ahead, as one list for each distance: [tokens, D, P] -> D times up to E experts.

    `predicted` are each token's candidates, the likeliest first. A candidate counts the more, the earlier its token
    names it; ties by id. Of a single token the order is its own.
    """
    if len(predicted) == 1:
        return tuple(map(tuple, predicted[0].tolist()))
    width = predicted.shape[2]
    points = np.broadcast_to(np.arange(width, 0, -1), (len(predicted), width)).ravel()
    ranked = []
    for distance in range(predicted.shape[1]):
        total = np.bincount(predicted[:, distance].ravel(), points)
        order = np.argsort(-total, kind="stable")
        ranked.append(tuple(order[: np.count_nonzero(total)].tolist()))
    return tuple(ranked)


def mean_scores(scores: NDArray[np.float16], sizes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Means over events, whose tokens are `sizes` consecutive rows, of scores or embeddings: [rows, ...] to
    [events, ...]."""
    sums = np.add.reduceat(scores.astype(np.float64), np.cumsum(sizes) - sizes)
    return (sums / sizes.reshape(-1, *[1] * (scores.ndim - 1))).astype(np.float32)


def mapped(rows: NDArray[np.int64]) -> Any:
    """An index of `rows` that copies nothing from a memory map where they lie together."""
    if rows[-1] - rows[0] + 1 == len(rows) and bool(np.all(np.diff(rows) == 1)):
        return slice(rows[0], rows[-1] + 1)
    return rows


def decodes(phase: NDArray[np.uint8], sizes: NDArray[np.int64], step: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether each pass decodes: it has a token that does, and none that reads a prompt."""
    pass_of_row = np.repeat(np.arange(len(sizes)), sizes)
    prefill = np.bincount(pass_of_row, phase == PREFILL, len(sizes)) > 0
    decode = np.bincount(pass_of_row, phase == DECODE, len(sizes)) > 0
    # Of nothing but padding there is only a pass where the sequences that it padded for were left out.
    padding = ~prefill & ~decode
    return (decode & ~prefill) | (padding & (step > 0))
