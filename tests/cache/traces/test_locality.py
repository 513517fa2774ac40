"""Locality: every metric against its definition, spelled out, and against independent figures of a real trace."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import batched_trace, random_trace, recorded

from cache.counting.counting import count
from cache.errors import TraceError
from cache.traces import locality, miss_ratio
from cache.traces.locality import expert_usage, load_entropy, segment_routing, token_overlap, union_sizes
from cache.traces.miss_ratio import lru_miss_ratio_curve
from cache.traces.passes import routing_events
from cache.traces.segment_cache import segment_cache
from cache.traces.trace import PADDING, Trace

SEEDS = st.integers(0, 2**32 - 1)


def any_trace(seed: int) -> Trace:
    return batched_trace(seed) if seed % 2 else random_trace(seed, lengths=(9, 2, 1, 6))


def tokens_of(trace: Trace, sequence: int, layer: int) -> list[list[int]]:
    """The experts of a sequence's tokens without padding, by ascending weight, ties by id."""
    result = []
    for token in range(trace.sequence_offsets[sequence], trace.sequence_offsets[sequence + 1]):
        if trace.phase[token] != PADDING:
            pairs = zip(trace.weights[token, layer].tolist(), trace.experts[token, layer].tolist(), strict=True)
            result.append([expert for _, expert in sorted(pairs)])
    return result


# LRU at every capacity.


def lru_hits(trace: Trace, layer: int, slots: int, cold: bool) -> tuple[int, int]:
    """Hits and accesses of one cache, event after event."""
    cache: list[int] = []  # most recent last
    hits = accesses = 0
    sequence = None
    for event in routing_events(trace):
        if cold and event.sequence != sequence:
            cache, sequence = [], event.sequence
        if event.layer == layer:
            hits += sum(expert in cache for expert in event.experts)
            accesses += len(event.experts)
            cache = [expert for expert in cache if expert not in event.experts] + list(event.experts)
            cache = cache[len(cache) - min(slots, len(cache)) :]
    return hits, accesses


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, cold=st.booleans(), chunk=st.sampled_from([1, 25, 2**22]))
def test_the_curve_is_lru_at_every_capacity(seed: int, cold: bool, chunk: int) -> None:
    trace = any_trace(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miss_ratio, "_CHUNK_USES", chunk)
        curve = lru_miss_ratio_curve(trace, cold=cold)
    expected = [[lru_hits(trace, layer, slots, cold) for slots in range(7)] for layer in range(2)]
    assert curve.hits.tolist() == [[hits for hits, _ in row] for row in expected]
    assert curve.accesses.tolist() == [row[0][1] for row in expected]
    assert curve.hit_rate[0] == 0 and np.all(np.diff(curve.hit_rate) >= 0)


def hits_at_every_capacity(trace: Trace, policy: str, cold: bool) -> list[int]:
    """Hits of a cache for each layer, from capacity 1 on."""
    capacities = [[slots] * trace.num_layers for slots in range(1, trace.num_experts + 1)]
    return [counted.hits for counted in count(trace, policy, capacities, cold=cold)]


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, cold=st.booleans())
def test_larger_caches_hit_more_often(seed: int, cold: bool) -> None:
    trace = any_trace(seed)
    assert hits_at_every_capacity(trace, "lru", cold) == lru_miss_ratio_curve(trace, cold=cold).hits.sum(0)[1:].tolist()
    optimum = hits_at_every_capacity(trace, "belady-bypass", cold)
    for stack in ("lfu", "lfru", "decay", "belady"):
        hits = hits_at_every_capacity(trace, stack, cold)
        assert np.all(np.diff(hits) >= 0), stack  # a larger cache holds what a smaller one holds
        assert np.all(np.array(hits) <= optimum)


@pytest.mark.parametrize(("cold", "at_8", "at_16"), [(True, 0.655, 0.891), (False, 0.657, 0.896)])
def test_lru_on_a_recorded_trace(cold: bool, at_8: float, at_16: float) -> None:
    rates = lru_miss_ratio_curve(recorded("gpt-oss-20b.mmlu.small"), cold=cold).hit_rate
    assert rates[8] == pytest.approx(at_8, abs=0.001) and rates[16] == pytest.approx(at_16, abs=0.001)


# Overlap, load and unions.


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, block=st.sampled_from([1, 20, 2**22]))
def test_overlap_and_entropy(seed: int, block: int) -> None:
    trace = any_trace(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locality, "_BLOCK_CELLS", block)
        usage, overlap, entropy = expert_usage(trace), token_overlap(trace), load_entropy(trace)
    for layer in range(2):
        sequences = [tokens_of(trace, s, layer) for s in range(trace.num_sequences)]
        used = Counter(expert for tokens in sequences for token in tokens for expert in token)
        assert usage[layer].tolist() == [used[expert] for expert in range(6)]
        shares = [used[expert] / used.total() for expert in used]
        assert entropy[layer] == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(6))
        pairs = [(a, b) for tokens in sequences for a, b in itertools.pairwise(tokens)]
        assert overlap[layer] == pytest.approx(sum(len({*a} & {*b}) for a, b in pairs) / (2 * len(pairs)))


def test_overlap_of_single_tokens_is_unknown() -> None:
    assert np.isnan(token_overlap(random_trace(lengths=(1, 1)))).all()


def test_overlap_of_a_recorded_trace() -> None:
    assert token_overlap(recorded("gpt-oss-20b.mmlu")).mean() == pytest.approx(0.436, abs=0.001)


def test_unions_count_events_as_they_ran() -> None:
    trace = batched_trace()
    sizes = union_sizes(trace)
    for phase, counts in (("prefill", sizes.prefill), ("decode", sizes.decode)):
        seen = Counter(len(event.experts) for event in routing_events(trace) if event.phase.value == phase)
        assert counts.tolist() == [seen[size] for size in range(7)]
    assert sizes.all.sum() == 2 * 8


# SRP.


def srp(trace: Trace, layers: list[int], length: int) -> tuple[float, int]:
    """The best F1 score over all thresholds, and the number of segments a layer, from the definition."""
    best, segments = float("nan"), 0
    windows = []
    for layer in layers:
        for s in range(trace.num_sequences):
            tokens = tokens_of(trace, s, layer)
            windows += [tokens[i : i + length] for i in range(len(tokens) - length + 1)]
    segments = len(windows) // len(layers)
    for threshold in range(1, length + 1):
        true = predicted = used = 0
        for window in windows:
            served = Counter(expert for token in window for expert in token)
            chosen = {expert for expert, count in served.items() if count >= threshold}
            true += sum(len(chosen & {*token}) for token in window)
            predicted += length * len(chosen)
            used += sum(len(token) for token in window)
        if windows:
            best = np.fmax(best, 2 * true / (predicted + used))
    return best, segments


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, length=st.integers(1, 10), block=st.sampled_from([1, 40, 2**22]))
def test_srp(seed: int, length: int, block: int) -> None:
    trace = any_trace(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locality, "_BLOCK_CELLS", block)
        routing = segment_routing(trace, length)
    for layers, layer in (([0, 1], None), ([0], 0), ([1], 1)):
        expected, segments = srp(trace, layers, length)
        assert routing.best(layer)[0] == pytest.approx(expected, nan_ok=True)
        assert routing.segments == segments
    if length == 1:  # one token is told by itself: nothing is predicted in vain
        assert routing.best() == (1.0, 1.0)


def test_rho_says_how_many_are_predicted() -> None:
    """Four tokens that alternate: expert 0 always, 1 and 2 by turns. Best are all three, for two that are used."""
    ids = [[[0, 1]], [[0, 2]], [[0, 1]], [[0, 2]]]
    trace = Trace.from_arrays(ids, np.ones((4, 1, 2)), [0, 4], num_experts=4)
    assert segment_routing(trace, 4).best() == (pytest.approx(2 * 8 / (12 + 8)), 1.5)


# SCH.


def sch(trace: Trace, layers: list[int], length: int, slots: int, every: int) -> tuple[int, int]:
    """Hits and accesses of caches that know what comes, expert after expert; `layers` share one."""
    hits = accesses = 0
    for s in range(0, trace.num_sequences, every):
        by_layer = [tokens_of(trace, s, layer) for layer in layers]
        events = [[(i, e) for i in range(len(layers)) for e in by_layer[i][t]] for t in range(len(by_layer[0]))]
        cache: list[tuple[int, int]] = []
        seen: dict[tuple[int, int], int] = {}
        time = 0
        for t, event in enumerate(events):
            before, touched = set(cache), 0
            for key in event:
                if key not in seen:
                    hits += len(seen) + touched < slots
                    touched += 1
                else:
                    hits += key in before
            accesses += len(event)
            window = events[t : t + length]
            for index, key in enumerate(event):
                used = Counter(k for later in window for k in later)
                used.subtract(event[:index])
                if key not in cache:
                    if len(cache) == slots:
                        cache.remove(min(cache, key=lambda k: (used[k], seen[k])))
                    cache.append(key)
                time += 1
                seen[key] = time
    return hits, accesses


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, pooled=st.booleans())
def test_sch(seed: int, pooled: bool) -> None:
    trace = any_trace(seed)
    lengths, ratios = (1, 2, 5, 30), (1, 2)
    result = segment_cache(trace, lengths=lengths, ratios=ratios, every=2, pooled=pooled)
    groups = [[0, 1]] if pooled else [[0], [1]]
    for m, length in enumerate(lengths):
        for c, ratio in enumerate(ratios):
            for g, layers in enumerate(groups):
                hits, accesses = sch(trace, layers, length, ratio * 2 * len(layers), every=2)
                assert (result.hits[m, c, g], result.accesses[g]) == (hits, accesses)
    assert result.hit_rate[0, 0] == pytest.approx(result.hits[0, 0].sum() / result.accesses.sum())


def test_sch_of_padding_alone_is_refused() -> None:
    trace = random_trace()
    trace = replace(trace, phase=np.full(trace.num_tokens, PADDING, np.uint8))
    with pytest.raises(TraceError, match="nothing but padding"):
        segment_cache(trace)
