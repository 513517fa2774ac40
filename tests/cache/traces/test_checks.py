"""All damage to a trace is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import random_trace, with_everything

from cache.errors import TraceError
from cache.traces.trace import Trace


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
    (changed("ids", 4, -1), "token 4: the id -1, below 0"),
    (changed("embeddings", (6, 2), np.inf), "token 6: an embedding with inf"),
    (lambda t: replace(t, embeddings=t.embeddings[:-1]), r'"embeddings" has the shape \[28, 5\], not \[29, any\]'),  # type: ignore[index]
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
        ((10**5).to_bytes(8, "little") + b"[" * 10**5, "header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "header is not a table"),
        ((2).to_bytes(8, "little") + b"{}", "not a routing trace"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TraceError, match=message):
        Trace.open(tmp_path / "t")
