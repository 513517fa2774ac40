"""Traces: what is written is read, all damage is said in one line, and events are those of the runtime."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from traces import batched_trace, random_trace, recorded, writer_of

from cache.errors import TraceError
from cache.traces import passes, tensorfile
from cache.traces.tensorfile import Column, write_tensors
from cache.traces.trace import PADDING, PREFILL, Trace, concatenate
from cache.traces.writer import TraceWriter, partial_folder, recover
from cache.types import Phase, RoutingEvent


def with_everything(seed: int = 0) -> Trace:
    """A batched trace with all optional arrays."""
    trace = batched_trace(seed)
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(trace.num_tokens, 2, 6)).astype(np.float16)
    scores[0, 0, 3] = -np.inf
    return replace(trace, scores=scores, predicted=rng.integers(0, 6, (trace.num_tokens, 2, 3, 4), dtype=np.uint8))


@pytest.mark.parametrize("make", [random_trace, batched_trace, with_everything])
def test_what_is_written_is_read(make: Callable[[], Trace], tmp_path: Path) -> None:
    trace = make()
    trace.write(tmp_path / "t.safetensors")
    again = Trace.open(tmp_path / "t.safetensors")
    assert again.fingerprint == trace.fingerprint and dict(again.metadata) == dict(trace.metadata)
    for name, array in load_file(tmp_path / "t.safetensors").items():  # the reference implementation reads it too
        assert np.array_equal(array, getattr(trace, name)) and array.dtype == getattr(trace, name).dtype
    for event, written in zip(again.events(), trace.events(), strict=True):
        assert event[:-1] == written[:-1] and np.array_equal(event.scores, written.scores)


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
    assert trace.expert_bytes == 4096 and trace.scores is None and trace.score_function is None
    assert random_trace().expert_bytes is None
    assert repr(trace) == "Trace(mine: 15 tokens, 3 sequences, 2 layers, top-2 of 6 experts)"


def test_the_fingerprint_sees_every_array() -> None:
    trace = with_everything()
    seen = {trace.fingerprint}
    for name in ("experts", "weights", "sequence_offsets", "step", "phase", "forward", "scores", "predicted"):
        array = getattr(trace, name).copy()
        array.flat[-1] += 1
        seen.add(replace(trace, **{name: array}).fingerprint)
    assert len(seen) == 9


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


# Damage.


def edited(**changes: Any) -> Callable[[Trace], Trace]:
    return lambda trace: replace(trace, **changes)


def changed(name: str, where: Any, value: Any) -> Callable[[Trace], Trace]:
    def change(trace: Trace) -> Trace:
        array = getattr(trace, name).copy()
        array[where] = value
        return replace(trace, **{name: array})

    return change


def said(**entries: str | None) -> Callable[[Trace], Trace]:
    def change(trace: Trace) -> Trace:
        metadata = {**trace.metadata, **entries}
        return replace(trace, metadata={key: value for key, value in metadata.items() if value is not None})

    return change


DAMAGE: list[tuple[Callable[[Trace], Trace], str]] = [
    (changed("experts", (5, 1, 0), 6), "token 5, layer 1: expert 6 of 6"),
    (lambda t: changed("experts", (5, 1, 0), t.experts[5, 1, 1])(t), r"token 5, layer 1: expert \d twice"),
    (changed("weights", (3, 0, 1), np.nan), "token 3, layer 0: a weight of nan"),
    (changed("weights", (3, 0, 0), np.inf), "token 3, layer 0: a weight of inf"),
    (changed("weights", (3, 0, 1), 9), "token 3, layer 0: weights that ascend, to 9"),
    (changed("sequence_offsets", 1, 16), "sequence 1 goes from token 16 to 16"),
    (changed("sequence_offsets", 0, 1), "cover the tokens 1 to"),
    (changed("sequence_offsets", -1, 12), "cover the tokens 0 to 12"),
    (edited(sequence_offsets=np.zeros(1, np.int64)), "no sequence"),
    (changed("step", 4, 0), "token 4: its step 0 is before the previous token's"),
    (changed("step", 0, -1), "token 0: its step is -1"),
    (changed("phase", 2, 3), "token 2: its phase is 3"),
    (changed("forward", 1, 11), "token 1: its forward pass 11 does not go with its step"),
    (changed("forward", slice(5, 6), 10), "token 5: its forward pass 10 does not go"),
    (changed("forward", slice(None), -1), "token 0: its forward pass is -1"),
    (changed("scores", (1, 1, 2), np.nan), "token 1, layer 1: a score of nan"),
    (changed("predicted", (1, 1, 2, 0), 7), "token 1, layer 1: predicted expert 7 of 6"),
    (lambda t: replace(t, step=t.step.astype(np.int64)), '"step" has dtype int64, not int32'),
    (lambda t: replace(t, weights=t.weights.astype(np.float64)), '"weights" has dtype float64'),
    (lambda t: replace(t, experts=t.experts[:, :1]), r'"experts" has the shape \[29, 1, 2\], not \[29, 2, 2\]'),
    (lambda t: replace(t, phase=t.phase[1:]), '"phase" has the shape'),
    (lambda t: replace(t, scores=t.scores[..., 1:]), '"scores" has the shape'),  # type: ignore[index]
    (said(model=None), 'no "model"'),
    (said(workload=None), 'no "workload"'),
    (said(num_experts=None), 'no "num_experts"'),
    (said(num_experts="many"), '"num_experts": "many", not a number'),
    (said(num_layers="-2"), '"num_layers": "-2", not a number'),
    (said(num_experts="1"), "2 of 1 experts"),
    (lambda t: said(num_experts="300")(replace(t, scores=None)), "uint8, too narrow for 300 experts"),
    (said(expert_bytes="much"), '"expert_bytes": "much"'),
    (said(layers="0,1,2"), "must be 2 ascending numbers"),
    (said(layers="1,1"), "must be 2 ascending numbers"),
    (said(layers="0;1"), 'says "layers": "0;1"'),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_damage_is_said(damage: Callable[[Trace], Trace], message: str) -> None:
    """Wherever the blocks of the check fall."""
    sound = with_everything()
    sound.check()
    with pytest.raises(TraceError, match=message) as caught:
        damage(sound).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("elements", [1, 30, 100])
def test_damage_is_found_in_every_block(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr("cache.traces.checks._BLOCK_ELEMENTS", elements)
    for damage, message in DAMAGE:
        with pytest.raises(TraceError, match=message):
            damage(with_everything()).check()
    with_everything().check()
    random_trace().check()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    random_trace().write(tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    for length in [*range(0, len(data), 37), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(TraceError, match="cut short"):
            Trace.open(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data + b"x")
    with pytest.raises(TraceError, match="bytes that belong to nothing"):
        Trace.open(tmp_path / "cut")


def rewritten(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """The trace file with its header changed."""
    random_trace().write(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h["__metadata__"].update(format="other"), "not a routing trace"),
        (lambda h: h["__metadata__"].update(version="2"), "a trace of version 2, this program reads version 1"),
        (lambda h: h["__metadata__"].pop("version"), "version none"),
        (lambda h: h.update({"__metadata__": {"a": 1}}), "not a table of texts"),
        (lambda h: h.pop("__metadata__"), "not a routing trace"),
        (lambda h: h.update(step2=h.pop("step")), "the trace has no step"),
        (lambda h: h["step"].update(shape=[14]), "not what its shape"),
        (lambda h: h["step"].update(shape=[-15]), 'entry of "step" in its header is damaged'),
        (lambda h: h["step"].update(shape="15"), 'entry of "step"'),
        (lambda h: h["step"].pop("data_offsets"), 'entry of "step"'),
        (lambda h: h["step"].update(data_offsets=[0, 60]), "not what its shape"),
        (lambda h: h["step"].update(dtype="F8"), '"step" has dtype F8'),
        (lambda h: h.update(step=[1]), 'entry of "step"'),
    ],
)
def test_damaged_headers_are_said(tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        Trace.open(rewritten(tmp_path / "t", edit))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header"),
        (b"PK\x03\x04 what a zip file starts with, and more of it", "no header"),
        ((4).to_bytes(8, "little") + b"nope", "header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "header is not a table"),
        ((2).to_bytes(8, "little") + b"{}", "not a routing trace"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TraceError, match=message):
        Trace.open(tmp_path / "t")


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    random_trace().write(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()

    def broken() -> Iterator[Any]:
        yield np.zeros(2, np.int32)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_tensors(tmp_path / "t", {"step": Column(np.int32, (4,), broken())}, {})
    with pytest.raises(ValueError, match="8 bytes for a shape"):
        write_tensors(tmp_path / "t", {"step": Column(np.int32, (4,), [np.zeros(2, np.int32)])}, {})
    assert (tmp_path / "t").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t"]


# Events.


def events_one_by_one(trace: Trace, sequences: list[int]) -> list[RoutingEvent]:
    """What the runtime would have made of the trace, token after token."""
    rows = []
    for s in sequences:
        for token in range(trace.sequence_offsets[s], trace.sequence_offsets[s + 1]):
            own = (s, int(trace.step[token]))
            rows.append(((int(trace.forward[token]),) if trace.forward is not None else own, s, token))
    rows.sort(key=lambda row: row[0])  # stable
    result = []
    for key in dict.fromkeys(row[0] for row in rows):
        members = [(s, token) for k, s, token in rows if k == key]
        phases = {int(trace.phase[token]) for _, token in members} - {PADDING}
        for layer in range(trace.num_layers):
            totals: dict[int, list[float]] = {}
            for _, token in members:
                for expert, weight in zip(trace.experts[token, layer], trace.weights[token, layer], strict=True):
                    totals.setdefault(int(expert), []).append(float(weight))
            weights = {}
            for expert, values in totals.items():
                weights[expert] = 0.0
                for value in values:
                    weights[expert] += value
            order = sorted(totals, key=lambda e: (weights[e], e))
            result.append(
                RoutingEvent(
                    members[0][0],
                    int(trace.step[members[0][1]]),
                    layer,
                    Phase.PREFILL if PREFILL in phases else Phase.DECODE,
                    tuple(order),
                    tuple(weights[e] for e in order),
                    tuple(len(totals[e]) for e in order),
                )
            )
    return result


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batched=st.booleans(),
    uses=st.sampled_from([1, 20, 2**18]),
    cells=st.sampled_from([1, 50, 2**20]),
)
def test_events_are_those_of_the_runtime(seed: int, batched: bool, uses: int, cells: int) -> None:
    trace = batched_trace(seed) if batched else random_trace(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_BLOCK_USES", uses)
        patch.setattr(passes, "_BLOCK_CELLS", cells)
        assert list(trace.events()) == events_one_by_one(trace, list(range(trace.num_sequences)))
        assert list(trace.events([2, 1])) == events_one_by_one(trace, [1, 2])


def test_steps_of_several_tokens_are_one_event() -> None:
    trace = Trace.from_arrays(
        [[[2, 0]], [[1, 2]], [[3, 0]]],
        [[[0.5, 0.25]], [[0.5, 0.25]], [[0.75, 0.25]]],
        [0, 3],
        num_experts=4,
        step=[0, 0, 1],
        phase=[0, 0, 1],
    )
    assert list(trace.events()) == [
        RoutingEvent(0, 0, 0, Phase.PREFILL, (0, 1, 2), (0.25, 0.5, 0.75), (1, 1, 2)),
        RoutingEvent(0, 1, 0, Phase.DECODE, (0, 3), (0.25, 0.75), (1, 1)),
    ]


def test_weights_are_added_one_by_one_in_order() -> None:
    """2**53 + 1 + 1 + 1 is 2**53 only if added so: the ones together, or compensated for, would make a difference."""
    weights = np.array([2**53, 1, 1, 1], np.float32).reshape(4, 1, 1)
    trace = Trace.from_arrays(np.zeros((4, 1, 1)), weights, [0, 4], num_experts=2, step=[0, 0, 0, 0])
    assert [event.weights for event in trace.events()] == [(float(2**53),)]


def test_interleaved_batches_come_in_running_order() -> None:
    """The second sequence runs inside of the first, the third before both."""
    trace = random_trace(lengths=(4, 2, 3))
    trace = replace(trace, forward=np.array([10, 11, 12, 13, 11, 12, 0, 1, 2]))
    trace.check()
    seen = [(event.sequence, event.step) for event in trace.events() if event.layer == 0]
    assert seen == [(2, 0), (2, 1), (2, 2), (0, 0), (0, 1), (0, 2), (0, 3)]
    assert sum(sum(event.tokens) for event in trace.events()) == 9 * 2 * 2


@pytest.mark.parametrize("sequences", [[3], [-1], []])
def test_sequences_that_are_not_there(sequences: list[int]) -> None:
    trace = random_trace()
    with pytest.raises(TraceError, match=r"no 3|no -1|at least one"):
        trace.select(sequences)
    with pytest.raises(TraceError):
        list(trace.events(sequences))


# Slices and joins.


@pytest.mark.parametrize("make", [random_trace, with_everything])
def test_select_and_concatenate(make: Callable[[int], Trace], tmp_path: Path) -> None:
    trace = make(1)
    alone = [trace.select([s]) for s in range(trace.num_sequences)]
    assert [t.num_tokens for t in alone] == np.diff(trace.sequence_offsets).tolist()
    parts = [trace.select([trace.num_sequences - 1]), trace.select(range(2))]
    joined = concatenate(parts, tmp_path / "t")
    joined.check()
    assert joined.num_sequences == 3
    strip = [(e.layer, e.experts, e.weights, e.tokens, e.phase) for e in joined.events()]
    assert strip == [(e.layer, e.experts, e.weights, e.tokens, e.phase) for t in parts for e in t.events()]
    reordered = trace.select([2, 0])
    assert np.array_equal(reordered.experts[: alone[2].num_tokens], alone[2].experts)
    assert np.array_equal(reordered.experts[alone[2].num_tokens :], alone[0].experts)


def test_selecting_neighbours_copies_nothing(tmp_path: Path) -> None:
    trace = random_trace()
    assert np.shares_memory(trace.select([1, 2]).experts, trace.experts)
    assert not np.shares_memory(trace.select([2, 1]).experts, trace.experts)


def test_joining_batches_and_others(tmp_path: Path) -> None:
    batches, others = batched_trace(), random_trace()
    joined = concatenate([others, batches, others], tmp_path / "t")
    joined.check()
    assert joined.forward is not None
    single = [event.experts for t in (others, batches, others) for event in t.events()]
    assert [event.experts for event in joined.events()] == single


def test_what_cannot_be_joined(tmp_path: Path) -> None:
    trace = with_everything()
    with pytest.raises(TraceError, match="has no scores, others have"):
        concatenate([trace, replace(trace, scores=None)], tmp_path / "t")
    with pytest.raises(TraceError, match="num_experts is 6 and 7"):
        concatenate([random_trace(), random_trace(experts=7)], tmp_path / "t")
    with pytest.raises(TraceError, match="model is unknown and other"):
        concatenate([random_trace(), random_trace(metadata={"model": "other"})], tmp_path / "t")
    with pytest.raises(TraceError, match="predicted of different shapes"):
        concatenate([trace, replace(trace, predicted=trace.predicted[:, :, :1])], tmp_path / "t")  # type: ignore[index]
    assert not list(tmp_path.iterdir())


def test_joined_metadata_keeps_what_is_common(tmp_path: Path) -> None:
    first, second = (random_trace(metadata={"workload": name, "dtype": "float32"}) for name in ("chat", "code"))
    joined = concatenate([first, second], tmp_path / "t")
    assert joined.workload == "chat + code" and joined.metadata["dtype"] == "float32"


# Writing as it goes.


@pytest.mark.parametrize("block", [1, 8 * 2**20])
def test_passes_become_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", block)
    monkeypatch.setattr("cache.traces.writer.BLOCK_BYTES", block)
    trace = with_everything()
    writer, rows = writer_of(trace, tmp_path / "t")
    for row in rows:
        writer.append(row)
    assert writer.kept_sequences == 0
    writer.keep()
    assert writer.kept_sequences == 4
    writer.finish()
    assert Trace.open(tmp_path / "t").fingerprint == trace.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_only_finished_sequences_are_kept(tmp_path: Path) -> None:
    trace = batched_trace()
    writer, rows = writer_of(trace, tmp_path / "t")
    for row in rows[:5]:  # the batch of three
        writer.append(row)
    writer.keep()
    for row in rows[5:-1]:
        writer.append(row)
    writer.drop()
    for row in rows[5:-1]:  # once more, and cut short again
        writer.append(row)
    writer.finish()
    assert Trace.open(tmp_path / "t").fingerprint == trace.select(range(3)).fingerprint


def test_nothing_finished_is_no_trace(tmp_path: Path) -> None:
    writer, rows = writer_of(random_trace(), tmp_path / "t")
    writer.append(rows[0])
    writer.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tail", ["", '{"rows": 29, "sequ'])
@pytest.mark.parametrize("make", [batched_trace, with_everything])
def test_a_killed_recording_is_recovered(tmp_path: Path, make: Callable[[], Trace], tail: str) -> None:
    trace = make()
    writer, rows = writer_of(trace, tmp_path / "t")
    for row in rows[:5]:
        writer.append(row)
    writer.keep()
    for row in rows[5:]:
        writer.append(row)
    with pytest.raises(TraceError, match="offload trace recover"):
        TraceWriter(tmp_path / "t", trace.metadata, scores=False)
    # What lies on disk now is what a killed process would leave; what is buffered is lost.
    shutil.copytree(partial_folder(tmp_path / "t"), partial_folder(tmp_path / "killed"))
    writer.discard()
    with (partial_folder(tmp_path / "killed") / "journal.jsonl").open("a") as journal:
        journal.write(tail)
    assert recover(tmp_path / "killed") == 3
    assert Trace.open(tmp_path / "killed").fingerprint == trace.select(range(3)).fingerprint
    assert not partial_folder(tmp_path / "killed").exists()
    with pytest.raises(TraceError, match="was interrupted: there is no"):
        recover(tmp_path / "killed")


def test_what_cannot_be_recovered(tmp_path: Path) -> None:
    writer, rows = writer_of(random_trace(), tmp_path / "t")
    writer.append(rows[0])
    folder = partial_folder(tmp_path / "t")
    with pytest.raises(TraceError, match="no finished sequence"):
        recover(tmp_path / "t")
    writer.keep()
    (folder / "experts").write_bytes(b"")
    with pytest.raises(TraceError, match=re.escape("experts has 0 bytes")):
        recover(tmp_path / "t")
    (folder / "journal.jsonl").write_text("nonsense\n")
    with pytest.raises(TraceError, match="damaged"):
        recover(tmp_path / "t")
    writer.discard()
    assert not folder.exists()


# A real one.


def test_a_recorded_trace_is_sound() -> None:
    trace = recorded("gpt-oss-20b.mmlu.small")
    assert (trace.num_tokens, trace.num_sequences, trace.num_layers, trace.top_k, trace.num_experts) == (
        7654,
        20,
        24,
        4,
        32,
    )
    assert sum(1 for _ in trace.events([0])) == 24 * np.diff(trace.sequence_offsets)[0]
