"""What routing has of order: experts that follow each other, that run together, and that run often.

The six patterns of "Patterns behind Chaos", before "Orders in Chaos" (arXiv:2510.05497), counted in a trace. Tables are
counted on the first half of its sequences and measured on the others, beside what the same tables say of the tokens
that they were counted on, as the paper has it. All look at single tokens, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.locality import expert_usage
from cache.traces.trace import DECODE, PADDING, PREFILL, Trace

LIKELIEST = 0.2
"""The share of a layer's experts that count as the likeliest."""
PAIRS = 0.1
"""The share of pairs of experts that count as the most frequent."""
TOPS = (5, 10, 20)

_BLOCK_CELLS = 2**22

Counts = NDArray[np.float64]
OneHot = NDArray[np.float32]
"""[groups, tokens, E]: 1 where a token goes to the expert."""


@dataclass(frozen=True)
class Following:
    """The share of what runs next that was among the likeliest 20 % of experts, given what runs now; [groups] each.

    A group is a pair of neighbouring layers, or a layer from one token to the next. Likeliest are the experts that a
    table of counts has most often beside the present expert; ties go to the expert used more, then to the lower id. NaN
    where nothing follows; all but `seen` are NaN for a trace of one sequence.
    """

    candidates: int
    """How many experts 20 % are: round(0.2 E), at least 1."""
    held_out: NDArray[np.float64]
    """Each present expert's own candidates, by the first half of sequences, measured on the others: over all pairs of a
    present and a next expert."""
    together: NDArray[np.float64]
    """The same with one set a token: the experts of the largest sum of the present experts' rows of the table, each
    divided by its sum."""
    popular: NDArray[np.float64]
    """The same with the experts used most in the first half, whatever runs now: what a table must beat."""
    seen: NDArray[np.float64]
    """As `held_out`, but counted and measured on all sequences."""


@dataclass(frozen=True)
class Popularity:
    """How alike the experts are that prompts and replies use, [L] each."""

    spearman: NDArray[np.float64]
    """Rank correlation of how often each expert is used; ties share their mean rank."""
    overlap: dict[int, NDArray[np.float64]]
    """For n of `TOPS` below E: which share of the n most used experts of prompts is among the n of replies."""


@dataclass(frozen=True)
class Together:
    """The share of pairs that run together in a token which the most frequent 10 % of pairs have, [L] each."""

    pairs: int
    """How many pairs 10 % are: round(0.1 E (E - 1) / 2), at least 1."""
    held_out: NDArray[np.float64]
    """The most frequent pairs of the first half of sequences, measured on the others."""
    seen: NDArray[np.float64]
    """Counted and measured on all sequences."""


@dataclass(frozen=True)
class Patterns:
    """All of them, of one trace."""

    next_layer: Following
    next_token: Following
    popularity: Popularity | None
    """None where the trace has only one of both phases."""
    together: Together | None
    """None where a token goes to a single expert."""
    skew: NDArray[np.float64]
    """[L]: how often a layer's most used expert is used, in times the mean of its experts."""


def find_patterns(trace: Trace) -> Patterns:
    """Counts everything; reads the trace four times, a block of tokens at a time."""
    usage = expert_usage(trace)
    return Patterns(
        next_layer=_following(trace, trace.num_layers - 1, _layer_pairs),
        next_token=_following(trace, trace.num_layers, _token_pairs),
        popularity=_popularity(trace),
        together=None if trace.top_k < 2 else _together(trace),
        skew=usage.max(1) / np.maximum(usage.mean(1), np.finfo(float).tiny),
    )


def _halves(trace: Trace) -> list[range]:
    middle = trace.num_sequences // 2
    return [range(middle), range(middle, trace.num_sequences)]


def _following(
    trace: Trace, groups: int, pairs_of: Callable[[Trace, range], Iterator[tuple[OneHot, OneHot]]]
) -> Following:
    first, others = _halves(trace)
    learned, measured = (_table(groups, trace.num_experts, pairs_of(trace, part)) for part in (first, others))
    both = learned + measured
    candidates = _share_of(LIKELIEST, trace.num_experts)
    popular = _mass(_likeliest(learned.sum(1), candidates), measured.sum(1))
    known = learned.any(axis=(1, 2))
    return Following(
        candidates,
        held_out=np.where(known, _mass(_likeliest(learned, candidates), measured), np.nan),
        together=np.where(known, _hits_together(learned, pairs_of(trace, others), candidates), np.nan),
        popular=np.where(known, popular, np.nan),
        seen=_mass(_likeliest(both, candidates), both),
    )


def _table(groups: int, experts: int, pairs: Iterator[tuple[OneHot, OneHot]]) -> Counts:
    """How often next expert j came beside present expert i, [groups, E, E]."""
    counts = np.zeros((groups, experts, experts))
    for present, following in pairs:
        counts += np.matmul(present.transpose(0, 2, 1), following)  # whole numbers far below 2**24: exact in float32
    return counts


def _hits_together(table: Counts, pairs: Iterator[tuple[OneHot, OneHot]], candidates: int) -> NDArray[np.float64]:
    """The share of next experts among the `candidates` of the largest sum of present experts' rows, [groups]."""
    used = table.sum(1, keepdims=True)
    popular = used / np.maximum(used.sum(-1, keepdims=True), 1)
    rows = table.sum(-1, keepdims=True)
    likely = np.where(rows > 0, table / np.maximum(rows, 1), popular)
    likely += 1e-9 * popular - 1e-12 * np.arange(table.shape[-1])  # which settles ties
    hits, total = np.zeros(len(table)), np.zeros(len(table))
    for present, following in pairs:
        score = np.matmul(present.astype(np.float64), likely)
        named = np.argpartition(score, -candidates, axis=-1)[..., -candidates:]
        hits += np.take_along_axis(following, named, axis=-1).sum((1, 2), dtype=np.float64)
        total += following.sum((1, 2), dtype=np.float64)
    return _divided(hits, total)


def _likeliest(counts: Counts, candidates: int) -> NDArray[np.bool_]:
    """Which of the last axis are largest; ties go to the column that all rows have most of, then to the lower id."""
    columns = counts.sum(1, keepdims=True) if counts.ndim == 3 else np.zeros_like(counts)
    order = np.argsort(-(counts + columns / (columns.sum(-1, keepdims=True) + 1)), axis=-1, kind="stable")
    chosen = np.zeros(counts.shape, bool)
    np.put_along_axis(chosen, order[..., :candidates], True, axis=-1)
    return chosen


def _mass(chosen: NDArray[np.bool_], counts: Counts) -> NDArray[np.float64]:
    """Of each group's counts the share that is chosen."""
    inner = tuple(range(1, counts.ndim))
    return _divided(np.where(chosen, counts, 0.0).sum(inner), counts.sum(inner))


def _divided(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0))


def _popularity(trace: Trace) -> Popularity | None:
    usage = [_phase_usage(trace, phase) for phase in (PREFILL, DECODE)]
    if not all(counts.any() for counts in usage):
        return None
    ranks = [_mean_ranks(counts) for counts in usage]
    centred = [rank - rank.mean(1, keepdims=True) for rank in ranks]
    size = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    order = [np.argsort(-counts, axis=1, kind="stable") for counts in usage]
    overlap = {}
    for top in TOPS:
        if top < trace.num_experts:
            shared = order[0][:, :top, None] == order[1][:, None, :top]
            overlap[top] = shared.sum((1, 2)) / top
    return Popularity(_divided((centred[0] * centred[1]).sum(1), size), overlap)


def _phase_usage(trace: Trace, phase: int) -> NDArray[np.int64]:
    """How many tokens of a phase went to each expert, [L, E]."""
    usage = np.zeros((trace.num_layers, trace.num_experts), np.int64)
    offset = np.arange(trace.num_layers)[:, None] * trace.num_experts
    for rows in _blocks(np.flatnonzero(trace.phase == phase), trace.num_layers * trace.top_k):
        cells = (trace.experts[rows] + offset).ravel()
        usage += np.bincount(cells, minlength=usage.size).reshape(usage.shape)
    return usage


def _mean_ranks(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Ranks within each row, from 0; what is equal shares the mean of its ranks."""
    below = (counts[:, :, None] > counts[:, None, :]).sum(-1)
    equal = (counts[:, :, None] == counts[:, None, :]).sum(-1)
    return np.asarray(below + (equal - 1) / 2)


def _together(trace: Trace) -> Together:
    first, others = (_pair_counts(trace, part) for part in _halves(trace))
    pairs = _share_of(PAIRS, first.shape[1])
    held_out = np.where(first.any(1), _mass(_likeliest(first, pairs), others), np.nan)
    both = first + others
    return Together(pairs, held_out, _mass(_likeliest(both, pairs), both))


def _pair_counts(trace: Trace, sequences: range) -> Counts:
    """How many tokens went to both experts of a pair, [L, E (E - 1) / 2]."""
    counts = np.zeros((trace.num_layers, trace.num_experts, trace.num_experts))
    for rows in _blocks(_real_rows(trace, sequences)[0], trace.num_layers * trace.num_experts):
        tokens = _one_hot(trace, rows)
        counts += np.matmul(tokens.transpose(0, 2, 1), tokens)
    one, another = np.triu_indices(trace.num_experts, 1)
    return counts[:, one, another]


def _layer_pairs(trace: Trace, sequences: range) -> Iterator[tuple[OneHot, OneHot]]:
    """A token's experts in a layer, and in the next MoE layer; groups are the layers but the last."""
    if trace.num_layers > 1:
        for rows in _blocks(_real_rows(trace, sequences)[0], trace.num_layers * trace.num_experts):
            tokens = _one_hot(trace, rows)
            yield tokens[:-1], tokens[1:]


def _token_pairs(trace: Trace, sequences: range) -> Iterator[tuple[OneHot, OneHot]]:
    """A token's experts in a layer, and those of the next token of its sequence there; groups are the layers."""
    rows, sequence = _real_rows(trace, sequences)
    starts = np.flatnonzero(sequence[1:] == sequence[:-1])
    for block in _blocks(starts, 2 * trace.num_layers * trace.num_experts):
        yield _one_hot(trace, rows[block]), _one_hot(trace, rows[block + 1])


def _real_rows(trace: Trace, sequences: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens of consecutive `sequences` that are no padding, and the sequence of each."""
    offsets = trace.sequence_offsets
    start, end = int(offsets[sequences.start]), int(offsets[sequences.stop])
    rows = start + np.flatnonzero(trace.phase[start:end] != PADDING)
    return rows, np.searchsorted(offsets, rows, side="right")


def _one_hot(trace: Trace, rows: NDArray[np.int64]) -> OneHot:
    experts: NDArray[Any] = trace.experts[rows].transpose(1, 0, 2).astype(np.int64)
    tokens = np.zeros((trace.num_layers, len(rows), trace.num_experts), np.float32)
    np.put_along_axis(tokens, experts, 1, axis=-1)
    return tokens


def _blocks(rows: NDArray[np.int64], cells: int) -> Iterator[NDArray[np.int64]]:
    step = max(1, _BLOCK_CELLS // cells)
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _share_of(share: float, many: int) -> int:
    return max(1, round(share * many))
