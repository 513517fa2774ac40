"""Divided layers where something fails, or a scheduler is wrong: it is raised, and the next reply is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from divided import open_model, small_host

import offload.engine.hook
from cache.errors import PolicyError, TransferError
from offload.decide.schedulers.base import Assignment, Costs, Load, Scheduler, timed


def test_a_failure_beside_the_accelerator_is_raised_and_the_next_reply_is_right(
    folder: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=8, do_sample=False)
    with open_model(folder, "cpu-only") as model:
        model.generate(prompt, max_new_tokens=8, do_sample=False)
        with monkeypatch.context() as patch:
            patch.setattr(offload.engine.hook._Beside, "job", lambda self, expert, weights: lambda: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                model.generate(prompt, max_new_tokens=8, do_sample=False)
        model.parts.runtime.settle()
        model.parts.runtime.manager.check_integrity()
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), wanted)


def test_a_read_for_the_cpu_that_fails_is_raised(folder: Path, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.store.plain import CheckpointReader

    small_host(monkeypatch, 2)
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=8, do_sample=False)
    with open_model(folder, "cpu-only") as model:
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        with monkeypatch.context() as patch:

            def fail(*args: Any) -> int:
                raise OSError("gone")

            patch.setattr(CheckpointReader, "read", fail)
            with pytest.raises(TransferError, match="gone"):
                model.generate(prompt, max_new_tokens=8, do_sample=False)
        model.parts.runtime.settle()
        model.parts.runtime.manager.check_integrity()
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), wanted)


def test_work_that_cannot_be_prepared_leaves_every_slot_free(
    folder: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as where host memory has no room for the rows. What was read for the CPU is in a staging slot here."""
    small_host(monkeypatch, 0)
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=8, do_sample=False)
    with open_model(folder, "cpu-only") as model:
        with monkeypatch.context() as patch:
            patch.setattr(offload.engine.hook._Beside, "job", lambda *_: 1 // 0)
            for _ in range(3):
                with pytest.raises(ZeroDivisionError):
                    model.generate(prompt, max_new_tokens=8, do_sample=False)
        (staging,) = model.parts.runtime.engine._host_staging
        assert staging.qsize() == model.plan.places
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), wanted)


class _Wrong(Scheduler):
    """Assigns as it is told to."""

    name = "wrong"

    def __init__(self, answer: Callable[[Sequence[Load]], tuple[Sequence[int], Sequence[int]]]) -> None:
        super().__init__()
        self.answer = answer

    def assign(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        return timed(loads, costs, *self.answer(loads))

    def serve(self, loads: Sequence[Load], costs: Costs) -> Assignment:
        return self.assign(loads, costs)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda loads: (range(1, len(loads)), ()), PolicyError, "scheduler _Wrong gave .* goes to one of them"),
        (lambda loads: (range(len(loads)), [0]), PolicyError, "scheduler _Wrong gave .* goes to one of them"),
        (lambda loads: ((), range(len(loads))), PolicyError, "that host memory will not have"),
        (lambda loads: 1 // 0, ZeroDivisionError, "zero"),
    ],
    ids=["left out", "twice", "not there", "fails"],
)
def test_what_no_scheduler_may_say_is_refused_and_the_next_reply_is_right(
    folder: Path,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
    answer: Any,
    error: type[Exception],
    words: str,
) -> None:
    small_host(monkeypatch, 0)
    prompt = tiny.ids(1, 9)
    wanted = expected.generate(prompt, max_new_tokens=8, do_sample=False)
    with open_model(folder, "dali") as model:
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        split = model.parts.runtime.manager.split
        assert split is not None
        scheduler, split.scheduler = split.scheduler, _Wrong(answer)
        with pytest.raises(error, match=words):
            model.generate(prompt, max_new_tokens=8, do_sample=False)
        split.scheduler = scheduler
        model.parts.runtime.settle()
        model.parts.runtime.manager.check_integrity()
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), wanted)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scheduler": "nobody"}, "no scheduler is called"),
        ({"scheduler": "ratio(most=2)"}, "cannot take these parameters"),
        ({"scheduler": "auto", "device": "cpu"}, "the CPU computes everything"),
    ],
)
def test_what_cannot_be_divided_is_refused(folder: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        tiny.open_model(folder, **({"device": "emulated"} | arguments))
