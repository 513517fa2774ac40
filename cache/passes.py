"""A trace as what the runtime saw: forward passes, and in each of them one routing event a layer.

The tokens of a pass, of all its sequences, are one event: the set of experts they need together. Events come out as the
live runtime makes them: experts by ascending total weight, ties by id; a total is the sum over the event's tokens,
sequence after sequence, added up one by one in double precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cache.types import Phase, RoutingEvent

if TYPE_CHECKING:
    from cache.trace import Trace

_PREFILL, _DECODE = 0, 1
_BLOCK_CELLS = 2**20  # (pass, layer, expert) in one block
_BLOCK_USES = 2**18  # (token, layer, k) in one block, as far as one pass has no more


@dataclass(frozen=True, slots=True)
class PassBlock:
    """P consecutive forward passes; N is the number of experts that their P * L events need, all together.

    Event (p, l) needs `experts[offsets[p * L + l] : offsets[p * L + l + 1]]`, in the order in which they are touched.
    """

    sequence: NDArray[np.int64]
    """[P]: the pass's sequence; of a batch the first."""
    step: NDArray[np.int64]
    """[P]: the pass within the sequence; in a batch, within the batch."""
    decode: NDArray[np.bool_]
    """[P]: whether it continues, rather than reads a prompt."""
    offsets: NDArray[np.int64]
    """[P * L + 1]."""
    experts: NDArray[np.int64]
    """[N]: ids by ascending total weight, ties by id."""
    weights: NDArray[np.float64]
    """[N]: total router weight."""
    tokens: NDArray[np.int64]
    """[N]: how many tokens go to the expert."""


def events(trace: Trace, sequences: Iterable[int] | None = None) -> Iterator[RoutingEvent]:
    """See `Trace.events`."""
    layers = range(trace.num_layers)
    for block in pass_blocks(trace, sequences):
        experts, weights, tokens = block.experts.tolist(), block.weights.tolist(), block.tokens.tolist()
        ends = iter(block.offsets[1:].tolist())
        start = 0
        for sequence, step, decode in zip(
            block.sequence.tolist(), block.step.tolist(), block.decode.tolist(), strict=True
        ):
            phase = Phase.DECODE if decode else Phase.PREFILL
            for layer in layers:
                end = next(ends)
                yield RoutingEvent(
                    sequence,
                    step,
                    layer,
                    phase,
                    tuple(experts[start:end]),
                    tuple(weights[start:end]),
                    tuple(tokens[start:end]),
                )
                start = end


def pass_blocks(trace: Trace, sequences: Iterable[int] | None = None) -> Iterator[PassBlock]:
    """See `Trace.passes`."""
    chosen = np.arange(trace.num_sequences) if sequences is None else np.unique(trace.existing(sequences))
    uses = max(1, _BLOCK_USES // (trace.num_layers * trace.top_k))
    cells = max(1, _BLOCK_CELLS // (trace.num_layers * trace.num_experts))
    for group in _batches(trace, chosen):
        tokens, starts = _running_order(trace, group)
        ends = np.append(starts[1:], len(tokens))
        first = 0
        while first < len(starts):
            last = int(np.searchsorted(ends, starts[first] + uses, "right"))
            last = min(max(last, first + 1), first + cells)
            yield _block(trace, group, tokens, starts, ends, slice(first, min(last, len(starts))))
            first = last


def _batches(trace: Trace, chosen: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
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


def _running_order(trace: Trace, group: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
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
    num_passes, num_experts = len(sizes), trace.num_experts
    rows = tokens[starts[chosen][0] : ends[chosen][-1]]
    pass_of_row = np.repeat(np.arange(num_passes), sizes)
    contiguous = rows[-1] - rows[0] + 1 == len(rows) and bool(np.all(np.diff(rows) == 1))
    where: Any = slice(rows[0], rows[-1] + 1) if contiguous else rows

    event = pass_of_row[:, None] * trace.num_layers + np.arange(trace.num_layers)  # [rows, L]
    cell = (event[:, :, None] * num_experts + trace.experts[where]).ravel()
    cells = num_passes * trace.num_layers * num_experts
    # bincount adds one by one, in order: so does the live runtime.
    totals: NDArray[Any] = np.bincount(cell, trace.weights[where].ravel(), cells)
    counts = np.bincount(cell, minlength=cells)
    needed = np.flatnonzero(counts)
    event_of, expert = np.divmod(needed, num_experts)
    order = np.lexsort((totals[needed], event_of))  # stable, and ids ascend: equal totals stay in order of id
    needed = needed[order]
    offsets = np.searchsorted(event_of, np.arange(num_passes * trace.num_layers + 1))

    first_rows = rows[np.cumsum(sizes) - sizes]
    alone = len(group) == 1
    return PassBlock(
        sequence=np.full(num_passes, group[0]),
        step=trace.step[first_rows].astype(np.int64) if alone else np.arange(len(starts))[chosen],
        decode=_decodes(trace.phase[where], pass_of_row, sizes, trace.step[first_rows]),
        offsets=offsets,
        experts=expert[order],
        weights=totals[needed],
        tokens=counts[needed],
    )


def _decodes(
    phase: NDArray[np.uint8], pass_of_row: NDArray[np.int64], sizes: NDArray[np.int64], step: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Whether each pass decodes: it has a token that does, and none that reads a prompt."""
    prefill = np.bincount(pass_of_row, phase == _PREFILL, len(sizes)) > 0
    decode = np.bincount(pass_of_row, phase == _DECODE, len(sizes)) > 0
    # Of nothing but padding there is only a pass where the sequences that it padded for were left out.
    padding = ~prefill & ~decode
    return (decode & ~prefill) | (padding & (step > 0))
