"""A trace as what the runtime saw: forward passes, and in each of them one routing event a layer.

The tokens of a pass, of all its sequences, are one event: the set of experts they need together. Events come out as the
live runtime makes them: experts by ascending total weight, ties by id; a total is the sum over the event's tokens,
sequence after sequence, added up one by one in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.ahead import Ahead, rank_ahead
from cache.traces.by_token import ByToken, kept_pairs, least, weight_before
from cache.traces.opening import openings
from cache.traces.trace import DECODE, PREFILL, Trace
from cache.types import Opening, Phase, RoutingEvent

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
    before: NDArray[np.float64] | None = None
    """[N]: as `RoutingEvent.before`, where it was asked for."""
    dropped: NDArray[np.int64] | None = None
    """[P * L]: as `RoutingEvent.dropped`, where a rule may drop."""


@dataclass(frozen=True, slots=True)
class PassBlock:
    """P consecutive forward passes."""

    sequence: NDArray[np.int64]
    """[P]: the pass's sequence; of a batch the first."""
    step: NDArray[np.int64]
    """[P]: the pass within the sequence; in a batch, within the batch."""
    decode: NDArray[np.bool_]
    """[P]: whether it continues, rather than reads a prompt."""
    several: NDArray[np.bool_]
    """[P]: whether it has more than one token."""
    uses: Uses
    ahead: Callable[[int, int], Ahead] | None
    """What was said ahead at (pass, layer), as `RoutingEvent.ahead`, where the trace has predictions."""
    opening: Callable[[int], Opening] | None = None
    """What a pass reads, where the trace has its tokens."""


def routing_events(
    trace: Trace, sequences: Iterable[int] | None = None, by_token: ByToken | None = None
) -> Iterator[RoutingEvent]:
    """One event for every forward pass and layer, in running order: those the live runtime made.

    Padding tokens count, since they are routed as well. A batch is one event, known by its first sequence.
    `sequences` is as in `pass_blocks`, `by_token` what a rule asks of every token.
    """
    layers = range(trace.num_layers)
    for block in pass_blocks(trace, sequences, by_token):
        uses = block.uses
        before = () if uses.before is None else tuple(uses.before.tolist())
        dropped = iter([0] * (len(uses.offsets) - 1) if uses.dropped is None else uses.dropped.tolist())
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
                    before[start:end] if block.several[index] else (),
                    next(dropped),
                    None if layer or block.opening is None else block.opening(index),
                    None if uses.scores is None else uses.scores[index, layer],
                )
                start = end


def pass_blocks(
    trace: Trace, sequences: Iterable[int] | None = None, by_token: ByToken | None = None
) -> Iterator[PassBlock]:
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
            yield _block(trace, group, tokens, starts, ends, slice(first, min(last, len(starts))), by_token)
            first = last


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
    by_token: ByToken | None,
) -> PassBlock:
    sizes = ends[chosen] - starts[chosen]
    rows = tokens[starts[chosen][0] : ends[chosen][-1]]
    first_rows = rows[np.cumsum(sizes) - sizes]
    alone = len(group) == 1
    decode = decodes(trace.phase[mapped(rows)], sizes, trace.step[first_rows])
    return PassBlock(
        sequence=np.full(len(sizes), group[0]),
        step=trace.step[first_rows].astype(np.int64) if alone else np.arange(len(starts))[chosen],
        decode=decode,
        several=sizes > 1,
        uses=uses_of(trace, rows, sizes, decode, by_token),
        ahead=None if trace.predicted is None else _ahead_of(trace, rows, sizes),
        opening=_openings(trace, rows, sizes),
    )


def uses_of(
    trace: Trace,
    rows: NDArray[np.int64],
    sizes: NDArray[np.int64],
    decode: NDArray[np.bool_],
    by_token: ByToken | None = None,
) -> Uses:
    """What the forward passes made of the tokens `rows` use: the first `sizes[0]` of them are one pass, and so on.

    `decode` [P] says which of them continue, `by_token` what a rule asks of every token.
    """
    where = mapped(rows)
    asked = by_token or ByToken()
    if len(rows) == len(sizes) and asked.keep is None:
        return _uses_of_single_tokens(trace, where)
    num_passes, num_experts = len(sizes), trace.num_experts
    event = np.repeat(np.arange(num_passes), sizes)[:, None] * trace.num_layers + np.arange(trace.num_layers)
    experts, weights = trace.experts[where], trace.weights[where]
    pairs: Any = slice(None)
    dropped = None
    if asked.keep is not None:
        kept = kept_pairs(asked.keep, experts, weights, sizes, decode)
        pairs = kept.ravel()
        dropped = np.bincount(event.ravel(), (~kept).sum(-1).ravel(), num_passes * trace.num_layers).astype(np.int64)
    cell = (event[:, :, None] * num_experts + experts).ravel()[pairs]  # of [rows, L, K]
    cells = num_passes * trace.num_layers * num_experts
    # bincount adds one by one, in order: so does the live runtime.
    totals = np.bincount(cell, weights.ravel()[pairs], cells).astype(np.float64, copy=False)
    counts = np.bincount(cell, minlength=cells)
    needed = np.flatnonzero(counts)
    event_of, expert = np.divmod(needed, num_experts)
    order = np.lexsort((totals[needed], event_of))  # stable, and ids ascend: equal totals stay in order of id
    needed = needed[order]
    offsets = np.searchsorted(event_of, np.arange(num_passes * trace.num_layers + 1))
    scores = None if trace.scores is None else mean_scores(trace.scores[where], sizes)
    before = least(cell, weight_before(experts, weights).ravel()[pairs], cells)[needed] if asked.before else None
    return Uses(offsets, expert[order], totals[needed], counts[needed], scores, before, dropped)


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


def _openings(trace: Trace, rows: NDArray[np.int64], sizes: NDArray[np.int64]) -> Callable[[int], Opening] | None:
    if trace.ids is None:
        return None
    where = mapped(rows)
    means = None if trace.embeddings is None else mean_scores(trace.embeddings[where], sizes)
    return openings(trace.ids[where], means, sizes)


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
