"""One model, many threads: each call has its turn, a call from within a call is refused, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from cache.errors import BusyError
from cache.traces.trace import Trace
from offload.model import OffloadedModel

ARGUMENTS: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
SOON = 0.1
LONG = 30.0


class Halted(BaseStreamer):  # type: ignore[misc]
    """Stops its generation at the second token until it may `go`."""

    def __init__(self) -> None:
        self.there, self.go = threading.Event(), threading.Event()
        self.tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        if self.tokens == 3:  # the prompt is the first thing put
            self.there.set()
            assert self.go.wait(LONG)

    def end(self) -> None: ...


@contextmanager
def busy(model: OffloadedModel, found: list[torch.Tensor]) -> Iterator[Halted]:
    """Another thread is in the midst of `generate`, until its streamer may go."""
    streamer = Halted()
    thread = threading.Thread(
        target=lambda: found.append(model.generate(tiny.ids(1, 8), streamer=streamer, **ARGUMENTS)), daemon=True
    )
    thread.start()
    assert streamer.there.wait(LONG)
    try:
        yield streamer
    finally:
        streamer.go.set()
        thread.join(LONG)
        assert not thread.is_alive()


def started(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def check_waits(call: Callable[[], object], streamer: Halted, meanwhile: Callable[[], bool] = lambda: True) -> None:
    """`call` waits for the one that `streamer` holds up, and ends after it; `meanwhile` holds until then."""
    thread = started(call)
    thread.join(SOON)
    assert thread.is_alive() and meanwhile()
    streamer.go.set()
    thread.join(LONG)
    assert not thread.is_alive()


@pytest.fixture
def model(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[OffloadedModel]:
    with tiny.open_model(checkpoint, expert_cache=tiny.FEW, device=getattr(request, "param", "cpu")) as model:
        yield model


both = pytest.mark.parametrize("model", ["cpu", "emulated"], indirect=True)


@both
def test_calls_from_many_threads_are_all_answered_rightly(model: OffloadedModel, resident: Any) -> None:
    prompts = [tiny.ids(1, 8, seed=seed) for seed in range(4)]
    expected = [resident.generate(prompt, **ARGUMENTS) for prompt in prompts]
    with torch.no_grad():
        logits = resident(prompts[0]).logits
    wrong: list[str] = []

    def ask(first: int) -> None:
        for i in range(first, first + 5):
            if not torch.equal(model.generate(prompts[i % 4], **ARGUMENTS), expected[i % 4]):
                wrong.append(f"reply {i % 4}")
            if not torch.equal(model(prompts[0]).logits, logits):
                wrong.append("logits")

    for thread in [started(lambda first=first: ask(first)) for first in range(4)]:  # type: ignore[misc]
        thread.join(LONG)
        assert not thread.is_alive()
    assert not wrong
    model.parts.runtime.settle()
    model.parts.runtime.manager.check_integrity()


@pytest.mark.parametrize("name", ["generate", "forward", "module"])
def test_a_second_call_waits_for_its_turn(model: OffloadedModel, resident: Any, name: str) -> None:
    """A call of the module inside, too, which has a turn for each pass."""
    prompt, first, second = tiny.ids(1, 5, seed=1), [], []
    calls: dict[str, Callable[[Any], object]] = {
        "generate": lambda each: each.generate(prompt, **ARGUMENTS),
        "forward": lambda each: each(prompt).logits,
        "module": lambda each: (each.module if each is model else each)(prompt).logits,
    }

    @torch.no_grad()
    def ask() -> None:
        second.append(calls[name](model))

    with busy(model, first) as streamer:
        check_waits(ask, streamer, meanwhile=lambda: not second)
    with torch.no_grad():
        assert torch.equal(second[0], calls[name](resident))
    assert torch.equal(first[0], resident.generate(tiny.ids(1, 8), **ARGUMENTS))


def test_who_will_not_wait_is_told_at_once(model: OffloadedModel) -> None:
    found: list[torch.Tensor] = []
    with busy(model, found):
        for call in (
            lambda: model.generate(tiny.ids(1, 5), wait=False, **ARGUMENTS),
            lambda: model(tiny.ids(1, 5), wait=False),
            lambda: model.close(wait=False),
        ):
            with pytest.raises(BusyError, match="another thread"):
                call()
        assert model.stats.as_dict()["prefill_tokens"] == 8  # what only looks does not wait
    assert found
    assert model.generate(tiny.ids(1, 5), wait=False, **ARGUMENTS) is not None


@pytest.mark.parametrize("name", ["use_predictor", "use_prefill", "use_scheduler", "reset_stats"])
def test_only_calls_and_close_can_be_told_not_to_wait(model: OffloadedModel, name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'wait'"):
        getattr(model, name)(**({} if name == "reset_stats" else {name.removeprefix("use_"): "none"}), wait=True)


def test_what_changes_the_model_waits_for_the_end_of_a_call(model: OffloadedModel, resident: Any) -> None:
    expected = resident.generate(tiny.ids(1, 8), **ARGUMENTS)
    for change in (
        lambda: model.use_predictor("frequency", depth=1),
        lambda: model.use_prefill("on-demand"),
        lambda: model.use_scheduler("gpu-only"),
        model.reset_stats,
        model.close,
    ):
        found: list[torch.Tensor] = []
        with busy(model, found) as streamer:
            check_waits(change, streamer, meanwhile=lambda: not model.closed)
        assert torch.equal(found[0], expected)
    assert model.closed and not tiny.offload_threads()


def test_who_waits_while_the_model_is_closed_is_told(model: OffloadedModel) -> None:
    errors: list[str] = []

    def ask() -> None:
        try:
            model.generate(tiny.ids(1, 5), **ARGUMENTS)
        except RuntimeError as error:
            errors.append(str(error))

    with busy(model, []) as streamer:
        closer = started(model.close)
        closer.join(SOON)
        waiting = started(ask)
        waiting.join(SOON)
        streamer.go.set()
        waiting.join(LONG)
        closer.join(LONG)
    assert errors == ["this OffloadedModel is closed"]


@pytest.mark.parametrize("name", ["generate", "forward", "use_predictor", "close", "record_trace"])
@pytest.mark.parametrize("place", ["streamer", "criterion"])
@both
def test_a_call_from_within_a_call_is_refused(
    model: OffloadedModel, resident: Any, tmp_path: Path, place: str, name: str
) -> None:
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: model.generate(tiny.ids(1, 5), **ARGUMENTS),
        "forward": lambda: model(tiny.ids(1, 5)),
        "use_predictor": lambda: model.use_predictor("none"),
        "close": model.close,
        "record_trace": lambda: model.record_trace(tmp_path / "t.safetensors").__enter__(),
    }

    class Asks(BaseStreamer):  # type: ignore[misc]
        def put(self, value: torch.Tensor) -> None:
            calls[name]()

        def end(self) -> None: ...

    with pytest.raises(BusyError, match="this very thread"):
        if place == "streamer":
            model.generate(tiny.ids(1, 8), streamer=Asks(), **ARGUMENTS)
        else:
            criteria = StoppingCriteriaList([lambda ids, scores, **_: calls[name]()])
            model.generate(tiny.ids(1, 8), stopping_criteria=criteria, **ARGUMENTS)
    expected = resident.generate(tiny.ids(1, 8), **ARGUMENTS)
    assert torch.equal(model.generate(tiny.ids(1, 8), **ARGUMENTS), expected)


def test_a_pass_within_a_pass_is_refused_and_one_between_two_is_not(model: OffloadedModel, resident: Any) -> None:
    """As guidance without a classifier does it: its processor asks the module for a second answer each time."""
    prompt, arguments = tiny.ids(1, 8), ARGUMENTS | {"guidance_scale": 1.5}
    assert torch.equal(model.generate(prompt, **arguments), resident.generate(prompt, **arguments))
    norm = model.module.model.norm
    hook = norm.register_forward_hook(lambda *_: model.module(prompt))
    with pytest.raises(BusyError, match="a hook within it"):
        model.generate(prompt, **ARGUMENTS)
    hook.remove()
    assert torch.equal(model.generate(prompt, **arguments), resident.generate(prompt, **arguments))


def test_a_streamer_reads_in_this_thread_what_another_generates(model: OffloadedModel, resident: Any) -> None:
    class Numbers:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{token} " for token in ids)

    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True)
    arguments = {"inputs": tiny.ids(1, 8), "streamer": streamer, **ARGUMENTS}
    thread = started(lambda: model.generate(**arguments))
    said = "".join(streamer)
    assert [int(word) for word in said.split()] == resident.generate(tiny.ids(1, 8), **ARGUMENTS)[0, 8:].tolist()
    thread.join(LONG)
    left = started(lambda: model.generate(**arguments))
    next(streamer)  # and the rest is never read
    assert model.generate(tiny.ids(1, 8), **ARGUMENTS).shape == (1, 16)
    left.join(LONG)
    assert not left.is_alive()


def test_a_trace_holds_whole_sequences_whoever_generates_meanwhile(model: OffloadedModel, tmp_path: Path) -> None:
    """Recording begins and ends between two calls, and not in the midst of another thread's."""
    path = tmp_path / "trace.safetensors"
    found: list[torch.Tensor] = []

    def record() -> None:
        with model.record_trace(path):
            model.generate(tiny.ids(1, 5), **ARGUMENTS)

    with busy(model, found) as streamer:
        check_waits(record, streamer)
    trace = Trace.open(path)
    assert (trace.num_sequences, trace.num_tokens) == (1, 5 + 7)


def test_a_trace_ends_behind_the_call_that_is_under_way(model: OffloadedModel, tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    recording = model.record_trace(path)
    recording.__enter__()
    with busy(model, []) as streamer:
        check_waits(lambda: recording.__exit__(None, None, None), streamer)
    trace = Trace.open(path)
    assert (trace.num_sequences, trace.num_tokens) == (1, 8 + 7)
