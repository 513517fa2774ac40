"""Recording: a trace replays to the very events of the run, and what cannot be recorded truthfully is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny_chat import environment
from transformers import StoppingCriteriaList

from cache.errors import TraceError, TransferError
from cache.traces.passes import routing_events
from cache.traces.trace import DECODE, PADDING, PREFILL, Trace
from cache.traces.writer import partial_folder, recover
from cache.types import RoutingEvent
from offload.model import OffloadedModel

FAMILY = "qwen3_moe"
PLAIN = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    yield from tiny.one_thread()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, threads: None) -> Iterator[OffloadedModel]:
    with tiny.open_model(tiny.save(tmp_path_factory.mktemp(FAMILY), FAMILY)) as model:
        yield model


@pytest.fixture
def events(model: OffloadedModel, monkeypatch: pytest.MonkeyPatch) -> list[RoutingEvent]:
    """What the manager is asked from now on."""
    asked: list[RoutingEvent] = []
    manager = model.parts.runtime.manager
    step = manager.step

    def spy(event: RoutingEvent) -> Any:
        asked.append(event)
        return step(event)

    monkeypatch.setattr(manager, "step", spy)
    return asked


def without_sequence(events: Any) -> list[tuple[object, ...]]:
    return [(e.step, e.layer, e.phase, e.experts, e.weights, e.tokens) for e in events]


def padded(*padding: int, columns: int = 9) -> dict[str, torch.Tensor]:
    """A batch of rows with so much left padding."""
    ids, mask = tiny.ids(len(padding), columns), torch.ones(len(padding), columns, dtype=torch.int64)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_a_trace_replays_the_events_of_the_run(
    model: OffloadedModel, events: list[RoutingEvent], tmp_path: Path
) -> None:
    """Of single sequences, padded batches, prompts in chunks, and passes without `generate`."""
    with model.record_trace(tmp_path / "t", workload="tests", seed=7) as recorder:
        model.generate(tiny.ids(1, 9), **PLAIN)
        assert recorder.num_sequences == 1
        model.generate(**padded(4, 0, 2), **PLAIN)
        model.generate(**padded(3, 0), prefill_chunk_size=4, **PLAIN)
        output = model(tiny.ids(1, 4), use_cache=True)
        model(tiny.ids(1, 1), past_key_values=output.past_key_values, use_cache=True)
    trace = Trace.open(tmp_path / "t")
    assert without_sequence(routing_events(trace)) == without_sequence(events)
    starts = [event.sequence for event in events if event.layer == event.step == 0]
    assert len(set(starts)) == 4 and trace.num_sequences == 7

    assert trace.phase[:14].tolist() == [PREFILL] * 9 + [DECODE] * 5
    assert trace.phase[14:28].tolist() == [PADDING] * 4 + [PREFILL] * 5 + [DECODE] * 5
    assert trace.phase[-5:].tolist() == [PREFILL] * 4 + [DECODE]
    chunked = slice(*trace.sequence_offsets[4:6].tolist())
    assert trace.step[chunked].tolist() == [0] * 4 + [1] * 4 + [2] + [3, 4, 5, 6, 7]
    assert trace.phase[chunked].tolist()[:4] == [PADDING] * 3 + [PREFILL]
    assert trace.weights.dtype == np.float32 and trace.scores is None
    said = {name: trace.metadata[name] for name in ("workload", "seed", "dtype", "layers")}
    assert said == {"workload": "tests", "seed": "7", "dtype": "float32", "layers": "0,1,2"}
    assert trace.expert_bytes == model.plan.slot_bytes and trace.model == model.plan.model
    assert not partial_folder(tmp_path / "t").exists()


def test_recording_changes_nothing(model: OffloadedModel, tmp_path: Path) -> None:
    plain = model.generate(**padded(2, 0), **PLAIN)
    logits = model(tiny.ids(1, 9)).logits
    with model.record_trace(tmp_path / "t", scores=True):
        assert torch.equal(model.generate(**padded(2, 0), **PLAIN), plain)
        assert tiny.same_bits(model(tiny.ids(1, 9)).logits, logits)
    model.generate(tiny.ids(1, 4), **PLAIN)
    assert Trace.open(tmp_path / "t").num_sequences == 3
    gate = model.module.get_submodule("model.layers.0.mlp.gate")
    assert model.parts.runtime.recorder is None and not gate._forward_hooks


def test_rows_that_ended_are_padding(model: OffloadedModel, tmp_path: Path) -> None:
    """The second row ends at once, as its first new token is declared an end; it is fed padding from then on."""
    batch = padded(0, 3)
    first = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    ends = next(int(token) for token in first[1, 9:] if token not in first[0])
    length = first[1, 9:].tolist().index(ends)
    with model.record_trace(tmp_path / "t"):
        model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=0)
    trace = Trace.open(tmp_path / "t")
    assert trace.phase[:16].tolist() == [PREFILL] * 9 + [DECODE] * 7
    assert trace.phase[16:].tolist() == [PADDING] * 3 + [PREFILL] * 6 + [DECODE] * length + [PADDING] * (7 - length)


def test_several_replies_to_one_prompt_are_a_batch(model: OffloadedModel, tmp_path: Path) -> None:
    with model.record_trace(tmp_path / "t"):
        model.generate(tiny.ids(1, 5), do_sample=True, num_return_sequences=3, max_new_tokens=4)
    trace = Trace.open(tmp_path / "t")
    assert trace.num_sequences == 3 and trace.forward is not None


# What is refused.


def test_beams_and_assistants_are_refused(model: OffloadedModel, tmp_path: Path) -> None:
    with model.record_trace(tmp_path / "t") as recorder:
        with pytest.raises(TraceError, match="beam search \\(2 beams\\)"):
            model.generate(tiny.ids(1, 5), num_beams=2, max_new_tokens=3)
        with pytest.raises(TraceError, match="assisted decoding"):
            model.generate(tiny.ids(1, 5), prompt_lookup_num_tokens=2, max_new_tokens=3)
        model.generate(tiny.ids(1, 5), max_new_tokens=3)
        assert recorder.num_sequences == 1
    assert Trace.open(tmp_path / "t").num_sequences == 1


def test_sequences_seen_from_the_middle_are_refused(model: OffloadedModel, tmp_path: Path) -> None:
    output = model(tiny.ids(1, 4), use_cache=True)
    with model.record_trace(tmp_path / "t"):
        with pytest.raises(TraceError, match="1 sequences of 4 tokens, recorded is nothing"):
            model(tiny.ids(1, 1), past_key_values=output.past_key_values, use_cache=True)
        own = model(tiny.ids(1, 3), use_cache=True)
        own.past_key_values.crop(-1)
        with pytest.raises(TraceError, match="1 sequences of 2 tokens, recorded is 1 of 3"):
            model(tiny.ids(1, 1), past_key_values=own.past_key_values, use_cache=True)
    assert not list(tmp_path.iterdir())


def test_a_batch_whose_padding_is_unknown_is_refused(model: OffloadedModel, tmp_path: Path) -> None:
    mask = torch.zeros(2, 1, 4, 4)
    with model.record_trace(tmp_path / "t"), pytest.raises(TraceError, match="cannot be told from its attention mask"):
        model(tiny.ids(2, 4), attention_mask=mask)


def test_what_is_there_is_kept(model: OffloadedModel, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("mine")
    with pytest.raises(TraceError, match="exists"):
        model.record_trace(tmp_path / "t")
    partial_folder(tmp_path / "u").mkdir()
    with pytest.raises(TraceError, match="interrupted recording"):
        model.record_trace(tmp_path / "u")
    with model.record_trace(tmp_path / "t", overwrite=True):
        assert (tmp_path / "t").read_text() == "mine"
        model(tiny.ids(1, 4))
        with pytest.raises(TraceError, match="one at a time"), model.record_trace(tmp_path / "v"):
            pass
    assert Trace.open(tmp_path / "t").num_tokens == 4
    assert model.parts.runtime.recorder is None


# What is kept when things go wrong.


def test_an_error_loses_only_what_was_under_way(model: OffloadedModel, tmp_path: Path) -> None:
    def stop(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    def record() -> None:
        with model.record_trace(tmp_path / "t"):
            model.generate(tiny.ids(1, 5), **PLAIN)
            model.generate(tiny.ids(1, 6), stopping_criteria=StoppingCriteriaList([stop]), **PLAIN)

    with pytest.raises(KeyboardInterrupt):
        record()
    assert np.diff(Trace.open(tmp_path / "t").sequence_offsets).tolist() == [10]


def test_a_pass_that_fails_ends_its_sequence(
    model: OffloadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = type(model.parts.runtime).run

    def broken(self: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.index == 1 and self.step == 2:
            raise TransferError("the disk is gone")
        return run(self, layer, *args, **kwargs)

    with model.record_trace(tmp_path / "t"):
        model.generate(tiny.ids(1, 5), **PLAIN)
        with monkeypatch.context() as patch:
            patch.setattr(type(model.parts.runtime), "run", broken)
            with pytest.raises(TransferError):
                model.generate(tiny.ids(1, 7), **PLAIN)
        model.generate(tiny.ids(1, 6), **PLAIN)
    assert np.diff(Trace.open(tmp_path / "t").sequence_offsets).tolist() == [10, 11]


KILLED = """
import os
from pathlib import Path
import tiny
with tiny.open_model(Path({folder!r})) as model, model.record_trace({target!r}):
    model.generate(tiny.ids(1, 5), min_new_tokens=4, max_new_tokens=4)
    model.generate(tiny.ids(1, 6), min_new_tokens=4, max_new_tokens=4)
    model(tiny.ids(1, 7))
    os._exit(9)
"""


def test_a_killed_process_leaves_what_it_finished(tmp_path: Path) -> None:
    folder, target = tiny.save(tmp_path / "model", FAMILY), tmp_path / "t"
    env = environment()
    tests = Path(__file__).parents[2]
    env["PYTHONPATH"] = os.pathsep.join([str(tests / "offload"), str(tests), env["PYTHONPATH"]])
    program = KILLED.format(folder=str(folder), target=str(target))
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 9, run.stderr
    assert not target.exists()
    assert recover(target) == 2
    assert np.diff(Trace.open(target).sequence_offsets).tolist() == [8, 9]


# Scores.


@pytest.mark.parametrize(
    ("family", "function"),
    [
        ("qwen3_moe", "softmax"),
        ("qwen2_moe", "softmax"),
        ("gpt_oss", "softmax"),
        ("flint", "sigmoid"),
        ("glm4_moe", "none"),  # a correction bias after the sigmoid
        ("ernie4_5_moe", "none"),
        ("gemma4_text", "softmax"),  # its router gives probabilities
    ],
)
def test_scores_are_what_experts_were_selected_on(family: str, function: str, tmp_path: Path) -> None:
    with (
        tiny.open_model(tiny.save(tmp_path / "model", family)) as model,
        model.record_trace(tmp_path / "t", scores=True),
    ):
        model.generate(**padded(2, 0), **PLAIN)
    trace = Trace.open(tmp_path / "t")
    assert trace.scores is not None and trace.metadata["score_function"] == function
    scores = trace.scores.astype(np.float32)
    chosen = np.sort(np.take_along_axis(scores, trace.experts.astype(np.int64), -1), -1)
    highest = np.sort(scores, -1)[..., -trace.top_k :]
    assert np.allclose(chosen, highest, rtol=2e-3, atol=2e-3)
    assert scores.std() > 0.01
    if function == "softmax" and family != "gemma4_text":  # which scales its experts
        best = np.take_along_axis(scores, trace.experts.astype(np.int64), -1)
        weights = np.exp(best - best.max(-1, keepdims=True))
        ratio = trace.weights / trace.weights.sum(-1, keepdims=True)
        assert np.allclose(weights / weights.sum(-1, keepdims=True), ratio, atol=5e-3)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deepseek_v3", 'the "deepseek_v3" family cannot be recorded: its router leaves out some of its 4 groups'),
        ("deepseek_v4", "it picks experts from a table"),
        ("phimoe", "not those of the highest scores"),
    ],
)
def test_scores_that_are_not_known_are_refused_by_name(family: str, reason: str, tmp_path: Path) -> None:
    with tiny.open_model(tiny.save(tmp_path / "model", family)) as model:
        with pytest.raises(TraceError, match=reason), model.record_trace(tmp_path / "t", scores=True):
            model.generate(tiny.ids(1, 9), **PLAIN)
        with model.record_trace(tmp_path / "t"):  # without them it can
            model.generate(tiny.ids(1, 9), **PLAIN)
    assert Trace.open(tmp_path / "t").num_tokens == 14


def test_near_even_weights_do_not_hide_the_function(tmp_path: Path) -> None:
    """Of tiny logits softmax and sigmoid make weights that look alike: the router's code tells them apart."""
    folder = tiny.save(tmp_path / "model", "qwen2_moe", torch.bfloat16)
    tiny.edit_tensors(folder, lambda tensors: [t.mul_(1e-3) for name, t in tensors.items() if "mlp.gate." in name])
    with tiny.open_model(folder) as model, model.record_trace(tmp_path / "t", scores=True):
        model.generate(tiny.ids(1, 9), **PLAIN)
    assert Trace.open(tmp_path / "t").metadata["score_function"] == "softmax"
