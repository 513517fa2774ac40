"""What published claims are measured on, and that each of them can be."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cache.traces.passes import routing_events
from cache.traces.trace import DECODE, PREFILL, Trace
from offload.decide.presets import PRESETS
from scripts.claims.claim import claims
from scripts.claims.eviction import unions
from scripts.claims.workloads import Workload, batched, only_decoding, part
from scripts.papers import measured, tables
from tests.cache.machines import machine

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def trace_of(lengths: tuple[int, ...] = (20,) * 8, seed: int = 0) -> Trace:
    """Popular experts, what the next gates said, scores, tokens and a prompt of three."""
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    scores = (rng.normal(size=(count, LAYERS, EXPERTS)) + np.linspace(0, 2, EXPERTS)).astype(np.float16)
    experts = np.argsort(-scores, axis=2, kind="stable")[:, :, :TOP_K]
    ahead = np.stack([np.roll(experts, -distance, axis=1) for distance in (1, 2, 3)], axis=2).astype(np.uint8)
    offsets = np.cumsum([0, *lengths])
    place = np.arange(count) - np.repeat(offsets[:-1], lengths)
    return Trace.from_arrays(
        experts,
        np.tile(np.array([0.6, 0.4], np.float32), (count, LAYERS, 1)),
        offsets,
        num_experts=EXPERTS,
        step=np.maximum(place - 2, 0),
        phase=np.where(place < 3, PREFILL, DECODE),
        metadata={"dtype": "bfloat16", "score_function": "softmax"},
        scores=scores,
        predicted=ahead,
        ids=rng.integers(0, 9, count, dtype=np.int32),
        embeddings=rng.normal(size=(count, 4)).astype(np.float16),
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = tmp_path_factory.mktemp("claims")
    trace_of().write(folder / "made.safetensors")
    return Workload("made", folder / "made.safetensors", folder, machine())


@pytest.mark.parametrize("number", range(len(claims())))
def test_every_claim_is_measured(work: Workload, number: int) -> None:
    """None of them says why it cannot, or has nothing to say, of a trace that has all."""
    each = claims()[number]
    said = measured(each, work)
    assert any(letter.isdigit() for letter in said) and not said.startswith("("), said
    assert each.theirs and each.ours and not each.theirs.endswith(".")


def test_presets_named_in_commands_exist() -> None:
    for each in claims():
        words = each.command.split()
        for flag, value in pairwise(words):
            if flag == "--preset":
                assert set(value.split(",")) <= PRESETS.keys()


def test_the_tables_have_every_claim(work: Workload) -> None:
    chosen = claims()[:3]
    found = {number: {"made": f"figure {number}"} for number in range(3)}
    text = tables(chosen, found, ["made"])
    assert all(f"| made | figure {number} |" in text for number in range(3))
    assert text.count("## ") == 2 and f"arXiv {chosen[0].source}" in text


def test_parts_are_held_out(work: Workload) -> None:
    assert Trace.open(work.learnt).num_sequences == work.held_out.num_sequences == 4
    assert work.begun.is_file() and Trace.open(work.begun).num_tokens + work.gone_on.num_tokens == 160
    first, second = (part(work.whole, *ends) for ends in ((0.0, 0.5), (0.5, 1.0)))
    for s in range(8):
        both = [t.experts[slice(*t.sequence_offsets[s : s + 2])] for t in (first, second)]
        assert np.array_equal(np.concatenate(both), work.whole.experts[20 * s : 20 * s + 20])
    second.check()


def test_batches_go_step_by_step_together() -> None:
    trace = trace_of((5, 4, 6, 3))
    found = batched(trace, 2)
    found.check()
    events = [event for event in routing_events(found) if event.layer == 0]
    assert [sum(event.tokens) // TOP_K for event in events] == [6, 2, 1, 6, 1, 1, 1]
    assert batched(trace, 2, order=[3, 0]).num_sequences == 2


def test_only_what_is_decoded_is_left() -> None:
    found = only_decoding(trace_of((5, 4, 6, 3)))
    assert found.sequence_offsets.tolist() == [0, 2, 3, 6] and set(found.phase) == {DECODE}
    found.check()


def test_grouping_alike_tokens_leaves_fewer_experts_in_a_batch() -> None:
    """Sequences 0 and 2 go to experts 0 and 1, sequences 1 and 3 to 6 and 7: batches as they come need four."""
    lengths = (6, 6, 6, 6)
    trace = trace_of(lengths)
    ids = np.tile(np.array([[0, 1]], np.uint8), (24, LAYERS, 1))
    for sequence in (1, 3):
        ids[6 * sequence : 6 * sequence + 6] = [7, 6]
    assert unions(replace(trace, experts=ids), 2) == [4.0, 2.0, 2.0]
