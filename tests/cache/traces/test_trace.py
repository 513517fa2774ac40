"""Traces: what is written is read, and sequences can be picked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from traces import batched_trace, random_trace, recorded, with_everything

from cache.errors import OutputError, TraceError
from cache.traces.passes import routing_events
from cache.traces.tensorfile import Column, write_tensors
from cache.traces.trace import Trace


@pytest.mark.parametrize("make", [random_trace, batched_trace, with_everything])
def test_what_is_written_is_read(make: Callable[[], Trace], tmp_path: Path) -> None:
    trace = make()
    trace.write(tmp_path / "t.safetensors")
    again = Trace.open(tmp_path / "t.safetensors")
    assert again.fingerprint == trace.fingerprint and dict(again.metadata) == dict(trace.metadata)
    for name, array in load_file(tmp_path / "t.safetensors").items():  # the reference implementation reads it too
        assert np.array_equal(array, getattr(trace, name)) and array.dtype == getattr(trace, name).dtype
    for event, written in zip(routing_events(again), routing_events(trace), strict=True):
        bare = [each._replace(scores=None, opening=None) for each in (event, written)]
        assert bare[0] == bare[1] and np.array_equal(event.scores, written.scores)
        assert (event.opening is None) == (written.opening is None)
        if event.opening is not None and written.opening is not None:
            assert event.opening.ids == written.opening.ids
            assert np.array_equal(event.opening.embedding, written.opening.embedding)


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    trace = random_trace()
    names = ("experts", "weights", "sequence_offsets", "step", "phase")
    save_file({name: getattr(trace, name) for name in names}, tmp_path / "t", metadata=dict(trace.metadata))
    assert Trace.open(tmp_path / "t").fingerprint == trace.fingerprint


def test_describes_itself() -> None:
    metadata = {"model": "some/model", "workload": "chat", "layers": "1,3", "expert_bytes": "4096"}
    trace = random_trace(metadata=metadata, name="mine")
    assert (trace.num_tokens, trace.num_layers, trace.num_experts, trace.top_k) == (15, 2, 6, 2)
    assert (trace.num_sequences, trace.layers, trace.model, trace.workload) == (3, (1, 3), "some/model", "chat")
    assert trace.expert_bytes == 4096 and trace.scores is None
    assert random_trace().expert_bytes is None
    assert repr(trace) == "Trace(mine: 15 tokens, 3 sequences, 2 layers, top-2 of 6 experts)"


def test_the_fingerprint_sees_every_array() -> None:
    trace = with_everything()
    seen = {trace.fingerprint}
    optional = ("forward", "scores", "predicted", "ids", "embeddings")
    for name in ("experts", "weights", "sequence_offsets", "step", "phase", *optional):
        array = getattr(trace, name).copy()
        array.flat[-1] += 1
        seen.add(replace(trace, **{name: array}).fingerprint)
    assert len(seen) == 11


def test_opening_maps_the_file(tmp_path: Path) -> None:
    random_trace().write(tmp_path / "t")
    trace = Trace.open(tmp_path / "t")
    base: Any = trace.experts
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap) and not trace.experts.flags.writeable


def test_many_experts_take_two_bytes(tmp_path: Path) -> None:
    trace = random_trace(experts=300, top_k=5)
    assert trace.experts.dtype == np.uint16
    trace.write(tmp_path / "t")
    assert Trace.open(tmp_path / "t").experts.max() > 255


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    random_trace().write(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()

    def broken() -> Iterator[Any]:
        yield np.zeros(2, np.int32)
        raise OSError("disk full")

    with pytest.raises(OutputError, match="t cannot be written: disk full"):
        write_tensors(tmp_path / "t", {"step": Column(np.int32, (4,), broken())}, {})
    with pytest.raises(ValueError, match="8 bytes for a shape"):
        write_tensors(tmp_path / "t", {"step": Column(np.int32, (4,), [np.zeros(2, np.int32)])}, {})
    assert (tmp_path / "t").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("make", [random_trace, with_everything])
def test_select(make: Callable[[int], Trace]) -> None:
    trace = make(1)
    alone = [trace.select([s]) for s in range(trace.num_sequences)]
    assert [t.num_tokens for t in alone] == np.diff(trace.sequence_offsets).tolist()
    reordered = trace.select([2, 0])
    assert np.array_equal(reordered.experts[: alone[2].num_tokens], alone[2].experts)
    assert np.array_equal(reordered.experts[alone[2].num_tokens :], alone[0].experts)


def test_selecting_neighbours_copies_nothing() -> None:
    trace = random_trace()
    assert np.shares_memory(trace.select([1, 2]).experts, trace.experts)
    assert not np.shares_memory(trace.select([2, 1]).experts, trace.experts)


@pytest.mark.parametrize("sequences", [[3], [-1], []])
def test_sequences_that_are_not_there(sequences: list[int]) -> None:
    trace = random_trace()
    with pytest.raises(TraceError, match=r"no 3|no -1|at least one"):
        trace.select(sequences)
    with pytest.raises(TraceError):
        list(routing_events(trace, sequences))


def test_a_recorded_trace_is_sound() -> None:
    trace = recorded("gpt-oss-20b.mmlu.small")
    assert (trace.num_tokens, trace.num_sequences, trace.num_layers, trace.top_k, trace.num_experts) == (
        7654,
        20,
        24,
        4,
        32,
    )
    assert sum(1 for _ in routing_events(trace, [0])) == 24 * np.diff(trace.sequence_offsets)[0]
