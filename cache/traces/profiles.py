"""What recorded traces say about a model beforehand: how often, and together with what, its experts are used."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.traces.passes import Uses, pass_blocks
from cache.traces.trace import Trace


def use_counts(trace: Trace) -> NDArray[np.int64]:
    """How many forward passes used each expert, [L, E]."""
    counts = np.zeros(trace.num_layers * trace.num_experts, np.int64)
    for block in pass_blocks(trace):
        _, layers = _events_of(block.uses, trace.num_layers)
        counts += np.bincount(layers * trace.num_experts + block.uses.experts, minlength=len(counts))
    return counts.reshape(trace.num_layers, trace.num_experts)


def activation_matrices(trace: Trace, most: int) -> NDArray[np.float64]:
    """How many tokens of a sequence went to each expert, [S, L, E], of at most so many sequences, evenly chosen."""
    chosen = evenly(trace.num_sequences, most)
    matrices = np.zeros((len(chosen), trace.num_layers, trace.num_experts))
    for matrix, sequence in zip(matrices, chosen, strict=True):
        tokens = slice(*trace.sequence_offsets[sequence : sequence + 2])
        layers = np.arange(trace.num_layers)[:, None]
        np.add.at(matrix, (np.broadcast_to(layers, trace.experts[tokens].shape), trace.experts[tokens]), 1)
    return matrices


def unit_rows(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row [.., E] scaled to length 1; of zeros where it is."""
    lengths = np.sqrt((matrices**2).sum(axis=-1, keepdims=True))
    units: NDArray[np.float64] = np.divide(matrices, lengths, out=np.zeros_like(matrices), where=lengths > 0)
    return units


def expert_maps(trace: Trace, most: int) -> NDArray[np.float64]:
    """The router's probabilities in a forward pass, [P, L, E], of at most so many passes, evenly chosen.

    They are the softmax of the recorded scores; of a trace without scores, the chosen experts' shares of the weight.
    """
    num_passes = sum(len(block.step) for block in pass_blocks(trace))
    chosen = evenly(num_passes, most)
    maps = np.zeros((len(chosen), trace.num_layers, trace.num_experts))
    first = done = 0
    for block in pass_blocks(trace):
        last = first + len(block.step)
        here = chosen[(chosen >= first) & (chosen < last)] - first
        maps[done : done + len(here)] = _probabilities(block.uses, len(block.step), trace)[here]
        first, done = last, done + len(here)
    return maps


def sketches(trace: Trace, most: int) -> NDArray[np.float64] | None:
    """What the passes of `expert_maps` read, [P, D]: their openings' embeddings. None where they were not recorded."""
    if trace.ids is None or trace.embeddings is None:
        return None
    blocks = [(block.opening, len(block.step)) for block in pass_blocks(trace)]
    chosen = set(evenly(sum(count for _, count in blocks), most).tolist())
    found, first = [], 0
    for opening, count in blocks:
        assert opening is not None
        found += [opening(index).embedding for index in range(count) if first + index in chosen]
        first += count
    return np.array(found, np.float64)


def evenly(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `count` indices, evenly spaced."""
    if count <= most:
        return np.arange(count)
    return np.arange(most) * count // most


def _probabilities(uses: Uses, num_passes: int, trace: Trace) -> NDArray[np.float64]:
    shape = num_passes, trace.num_layers, trace.num_experts
    if uses.scores is not None:
        maps = np.exp(uses.scores - uses.scores.max(axis=2, keepdims=True, initial=-1e38), dtype=np.float64)
    else:
        maps = np.zeros(shape)
        passes, layers = _events_of(uses, trace.num_layers)
        maps[passes, layers, uses.experts] = uses.weights
    sums = maps.sum(axis=2, keepdims=True)
    probabilities: NDArray[np.float64] = np.divide(maps, sums, out=np.zeros(shape), where=sums > 0)
    return probabilities


def _events_of(uses: Uses, num_layers: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pass and the layer of each use."""
    events = np.repeat(np.arange(len(uses.offsets) - 1), np.diff(uses.offsets))
    return np.divmod(events, num_layers)
