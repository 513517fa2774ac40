"""A trace, logged as another program would have, is the trace again; what is no log is refused, saying where."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import foreign_logs as logs
import numpy as np
import pytest
from foreign_logs import imported, made_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import TraceError
from cache.traces.imports.logged import ImportOptions
from cache.traces.imports.read import Log
from cache.traces.trace import DECODE, PREFILL, Trace


def assert_same(found: Trace, trace: Trace, weights: bool) -> None:
    for name in ("experts", "sequence_offsets", "step", "phase"):
        np.testing.assert_array_equal(getattr(found, name), getattr(trace, name), name)
    assert (found.layers, found.num_experts, found.top_k) == (trace.layers, trace.num_experts, trace.top_k)
    assert "prompts" not in found.metadata
    if weights:
        np.testing.assert_allclose(found.weights, trace.weights, rtol=1e-6)
    else:
        assert (found.weights == np.float32(1 / trace.top_k)).all()
        assert found.metadata["weights"] == "equal: the log has none"


SHAPES = st.tuples(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    st.sampled_from([(0,), (0, 1), (1, 3, 7)]),
    st.integers(3, 9),
    st.integers(2, 3),
)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.sampled_from(["safetensors", "npz"]), st.booleans())
def test_logits_of_transformers_come_back(shape: Any, kind: str, scores: bool) -> None:
    trace = made_trace(*shape)
    with tempfile.TemporaryDirectory() as folder:
        (place := Path(folder) / "log").mkdir()
        found = imported(logs.transformers_log(trace, place, kind), ImportOptions(top_k=trace.top_k, scores=scores))
        assert_same(found, trace, weights=True)
        assert found.metadata["score_function"] == "softmax"
        assert (found.scores is not None) == scores
        if scores:
            np.testing.assert_array_equal(found.scores, trace.scores)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.sampled_from(["npz", "apart", "jsonl", "server"]))
def test_ids_of_vllm_come_back(shape: Any, kind: str) -> None:
    seed, lengths, layers, experts, top_k = shape
    trace = made_trace(seed, lengths, tuple(range(len(layers))), experts, top_k)
    with tempfile.TemporaryDirectory() as folder:
        (place := Path(folder) / "log").mkdir()
        found = imported(logs.vllm_log(trace, place, kind), ImportOptions(num_experts=experts))
        assert_same(found, trace, weights=False)


@settings(max_examples=30, deadline=None)
@given(SHAPES)
def test_files_of_orders_in_chaos_come_back(shape: Any) -> None:
    trace = made_trace(*shape)
    with tempfile.TemporaryDirectory() as folder:
        (place := Path(folder) / "log").mkdir()
        found = imported(logs.orders_log(trace, place, dense=(2, 9)), ImportOptions(num_experts=trace.num_experts))
        # Files come in the order of their folders: first the even subjects.
        order = sorted(range(trace.num_sequences), key=lambda number: (number % 2, number))
        assert_same(found, trace.select(order), weights=False)


def test_metadata_says_where_it_comes_from(tmp_path: Path) -> None:
    source = logs.orders_log(made_trace(0, (3,)), tmp_path / "log")
    Log(source).write(tmp_path / "a", ImportOptions(num_experts=6), model="M")
    Log(source).write(tmp_path / "b", ImportOptions(num_experts=6), workload="W")
    first, second = (Trace.open(tmp_path / name) for name in "ab")
    assert (first.model, first.workload) == ("M", "log") and (second.model, second.workload) == ("unknown", "W")
    assert first.metadata["source"] == "offload trace import, orders-in-chaos"


def test_a_prompt_is_what_was_said(tmp_path: Path) -> None:
    ids = np.array([[[0, 1]], [[1, 2]], [[2, 3]], [[3, 4]]])
    np.save(tmp_path / "a.npy", ids)
    unknown = imported(tmp_path / "a.npy", ImportOptions(num_experts=5))
    assert unknown.phase.tolist() == [DECODE] * 4 and unknown.step.tolist() == [0, 1, 2, 3]
    assert unknown.metadata["prompts"].startswith("not marked")
    stated = imported(tmp_path / "a.npy", ImportOptions(num_experts=5, prompt_tokens=3))
    assert stated.phase.tolist() == [PREFILL] * 3 + [DECODE] and stated.step.tolist() == [0, 0, 0, 1]
    none = imported(tmp_path / "a.npy", ImportOptions(num_experts=5, prompt_tokens=0))
    assert none.phase.tolist() == [DECODE] * 4 and "prompts" not in none.metadata
    whole = imported(tmp_path / "a.npy", ImportOptions(num_experts=5, prompt_tokens=4))
    assert whole.phase.tolist() == [PREFILL] * 4 and whole.step.tolist() == [0] * 4


def test_only_the_first_sequences(tmp_path: Path) -> None:
    source = logs.orders_log(made_trace(0, (3, 2, 4)), tmp_path / "log")
    assert Log(source).total == 3
    assert imported(source, ImportOptions(num_experts=6, limit=2)).num_sequences == 2


def test_probabilities_are_taken_for_what_they_are(tmp_path: Path) -> None:
    logits = np.array([[1.0, 3.0, 2.0], [0.5, 0.0, 4.0]])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    logs.save_logits(tmp_path / "logits.npz", {"layer.0": logits})
    logs.save_logits(tmp_path / "shares.npz", {"layer.0": shares})
    options = ImportOptions(top_k=2, scores=True)
    one, other = (imported(tmp_path / f"{name}.npz", options) for name in ("logits", "shares"))
    np.testing.assert_array_equal(one.experts, other.experts)
    np.testing.assert_allclose(one.weights, other.weights, rtol=1e-6)
    assert one.scores is not None and other.scores is not None
    assert other.scores.max() < 0 < one.scores.max()


def test_ties_go_by_id(tmp_path: Path) -> None:
    logits = np.zeros((2, 64))
    logits[1, 40:] = 1
    logs.save_logits(tmp_path / "a.npz", {"layer.0": logits})
    found = imported(tmp_path / "a.npz", ImportOptions(top_k=3))
    assert found.experts[:, 0].tolist() == [[0, 1, 2], [40, 41, 42]]


def test_layers_without_experts_are_left_out(tmp_path: Path) -> None:
    """vLLM up to 0.20 has zeros for them."""
    ids = np.array([[[0, 0], [0, 1], [0, 0], [2, 0]], [[0, 0], [3, 1], [0, 0], [0, 2]]])
    np.save(tmp_path / "a.npy", ids)
    assert imported(tmp_path / "a.npy", ImportOptions(num_experts=4)).layers == (1, 3)
    chosen = imported(tmp_path / "a.npy", ImportOptions(num_experts=4, layers=(3,)))
    assert chosen.layers == (3,) and chosen.experts[:, 0].tolist() == [[2, 0], [0, 2]]
    (folder := tmp_path / "log").mkdir()
    np.save(folder / "a.npy", ids)
    np.save(folder / "b.npy", ids[:, ::-1])
    with pytest.raises(TraceError, match=r"b\.npy: layer 0 has experts here"):
        imported(folder, ImportOptions(num_experts=4))


def test_zeros_may_be_real_where_a_token_goes_to_one_expert(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2, 1), np.int16))
    assert imported(tmp_path / "a.npy", ImportOptions(num_experts=4)).layers == (0, 1)


def test_each_choice_of_a_response_is_a_sequence(tmp_path: Path) -> None:
    """With vLLM 0.21's prompt apart, which choices share."""
    response = {
        "choices": [{"routed_experts": [[[2, 3]], [[0, 1]]]}, {"routed_experts": [[[1, 0]]]}],
        "prompt_routed_experts": [[[0, 3]]],
        "usage": {"prompt_tokens": 1},
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(response))
    found = imported(tmp_path / "a.jsonl", ImportOptions(num_experts=4))
    assert found.experts[:, 0].tolist() == [[0, 3], [2, 3], [0, 1], [0, 3], [1, 0]]
    assert found.phase.tolist() == [PREFILL, DECODE, DECODE, PREFILL, DECODE]


def test_the_format_goes_by_the_files(tmp_path: Path) -> None:
    logs.save_logits(tmp_path / "a.npz", {"layer.0": np.zeros((1, 4))})
    np.savez(tmp_path / "b.npz", routed_experts=np.zeros((1, 1, 1), int))
    for name, format in (("a.npz", "transformers"), ("b.npz", "vllm")):
        assert Log(tmp_path / name).format == format
    (tmp_path / "c.json").write_text("[]")
    assert Log(tmp_path / "c.json").format == "orders-in-chaos"
    (tmp_path / "b.npz").unlink()
    with pytest.raises(TraceError, match="may hold logs of orders-in-chaos and transformers: say which"):
        Log(tmp_path)
    assert [path.name for path in Log(tmp_path, "orders-in-chaos").files] == ["c.json"]
