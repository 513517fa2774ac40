"""What a trace says about a model: how evenly it uses its experts, and how alike neighbouring tokens are.

SRP (segment routing best performance) is a metric of "Not All Models Suit Expert Offloading" (arXiv:2505.16056); its
other one, SCH, is in segment_cache.py. All but the union sizes look at single tokens, whatever batch they ran in, and
leave padding out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.traces.passes import pass_blocks
from cache.traces.trace import PADDING, Trace

SEGMENT_LENGTHS = (4, 16, 64, 256)
_BLOCK_CELLS = 2**22


def expert_usage(trace: Trace) -> NDArray[np.int64]:
    """How many tokens went to each expert, [L, E]."""
    usage = np.zeros((trace.num_layers, trace.num_experts), np.int64)
    offset = np.arange(trace.num_layers)[None, :, None] * trace.num_experts
    for sequence in range(trace.num_sequences):
        for experts in _blocks(real_tokens(trace, sequence), trace.num_layers * trace.top_k):
            cells = (experts + offset).ravel()
            usage += np.bincount(cells, minlength=usage.size).reshape(usage.shape)
    return usage


def load_entropy(trace: Trace) -> NDArray[np.float64]:
    """Entropy of each layer's use of its experts as a share of the largest there can be, [L]: 1 is perfectly even."""
    usage = expert_usage(trace)
    share = usage / np.maximum(usage.sum(1, keepdims=True), 1)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.asarray(-(share * logs).sum(1) / np.log(max(trace.num_experts, 2)))


def token_overlap(trace: Trace) -> NDArray[np.float64]:
    """The mean share of a token's experts that the token before it in its sequence went to as well, [L].

    If experts were drawn evenly it would be K / E. NaN where no sequence has two tokens.
    """
    shared, pairs = np.zeros(trace.num_layers, np.int64), 0
    for sequence in range(trace.num_sequences):
        for experts in _blocks(real_tokens(trace, sequence), trace.num_layers * trace.top_k**2, overlap=1):
            same = experts[1:, :, :, None] == experts[:-1, :, None, :]
            shared += np.count_nonzero(same, axis=(0, 2, 3))
            pairs += len(experts) - 1
    return shared / (pairs * trace.top_k) if pairs else np.full(trace.num_layers, np.nan)


@dataclass(frozen=True)
class SegmentRouting:
    """How well the experts of a segment of `length` tokens can be told in advance by one set for the whole segment.

    Segments are all runs of `length` tokens inside a sequence; `segments` is how many there are. `counts` int64
    [L, length + 1]: for how many (segment, expert) the expert serves exactly so many of the tokens.
    """

    length: int
    segments: int
    counts: NDArray[np.int64]

    def best(self, layer: int | None = None) -> tuple[float, float]:
        """(SRP, rho) of a layer, or of the model: there the counts of all layers are pooled, and one a serves all.

        SRP is the best F1 score, over all a, of predicting for every token of a segment the experts that serve at least
        a of its tokens; rho is how many experts the best a predicts for each that is used. NaN without a segment.
        """
        counts = self.counts.sum(0) if layer is None else self.counts[layer]
        uses = np.arange(self.length + 1)
        matches = (uses * counts)[::-1].cumsum()[::-1]
        predictions = self.length * counts[::-1].cumsum()[::-1]
        used = matches[0]
        if not used:
            return float("nan"), float("nan")
        f1 = 2 * matches[1:] / (predictions[1:] + used)  # predicting what serves none helps nobody
        threshold = int(f1.argmax()) + 1
        return float(f1[threshold - 1]), float(predictions[threshold] / used)


def segment_routing(trace: Trace, length: int) -> SegmentRouting:
    """SRP's counts for segments of `length` tokens."""
    num_layers, num_experts = trace.num_layers, trace.num_experts
    counts = np.zeros(num_layers * (length + 1), np.int64)
    segments = 0
    cell = np.arange(num_layers)[:, None] * num_experts
    for sequence in range(trace.num_sequences):
        tokens = real_tokens(trace, sequence)
        segments += max(len(tokens) - length + 1, 0)
        for experts in _blocks(tokens, num_layers * num_experts, overlap=length - 1):
            active = np.zeros((len(experts) + 1, num_layers * num_experts), np.int32)
            np.put_along_axis(active[1:], (experts + cell).reshape(len(experts), -1), 1, axis=1)
            np.cumsum(active, axis=0, out=active)
            served = (active[length:] - active[:-length]).reshape(-1, num_layers, num_experts)
            served += np.arange(num_layers, dtype=np.int32)[:, None] * (length + 1)
            counts += np.bincount(served.ravel(), minlength=len(counts))
    return SegmentRouting(length, segments, counts.reshape(num_layers, length + 1))


@dataclass(frozen=True)
class UnionSizes:
    """How many experts an event needs: `prefill` and `decode` are int64 [E + 1], events by their number of experts."""

    prefill: NDArray[np.int64]
    decode: NDArray[np.int64]

    @property
    def all(self) -> NDArray[np.int64]:
        """Both phases."""
        return self.prefill + self.decode


def union_sizes(trace: Trace) -> UnionSizes:
    """Counts every event of the trace; batches and padding count here, as they ran."""
    sizes = np.zeros((2, trace.num_experts + 1), np.int64)
    for block in pass_blocks(trace):
        needed = np.diff(block.uses.offsets).reshape(-1, trace.num_layers)
        for phase in (False, True):
            sizes[int(phase)] += np.bincount(needed[block.decode == phase].ravel(), minlength=sizes.shape[1])
    return UnionSizes(sizes[0], sizes[1])


def real_tokens(trace: Trace, sequence: int) -> NDArray[Any]:
    """The experts of a sequence's tokens without padding, [n, L, K]."""
    start, end = trace.sequence_offsets[sequence : sequence + 2].tolist()
    experts, real = trace.experts[start:end], trace.phase[start:end] != PADDING
    return experts if real.all() else experts[real]


def _blocks(tokens: NDArray[Any], cells: int, overlap: int = 0) -> Iterator[NDArray[np.int64]]:
    """`tokens` in blocks that share `overlap` tokens with the next, none shorter than overlap + 1."""
    step = max(1, _BLOCK_CELLS // cells)
    for start in range(0, len(tokens) - overlap, step):
        yield tokens[start : start + step + overlap].astype(np.int64)
