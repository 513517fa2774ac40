"""What passes read, live: recorded and told as a trace has it; it changes nothing but time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from by_hand import believes_in_time
from live_model import always_on, check_books, drive, open_model
from logs import first_difference, twin

from cache.errors import TraceError
from cache.traces.passes import routing_events
from cache.traces.trace import Trace
from cache.types import RoutingEvent
from offload.decide.prefetch import Prefetcher
from offload.decide.prefetchers.base import make_rule
from offload.layers.opening import SKETCH, signs

PLAIN: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def test_a_trace_has_the_tokens_and_sketches_of_their_embeddings(folder: Path, tmp_path: Path) -> None:
    with tiny.open_model(folder) as model, model.record_trace(tmp_path / "t", inputs=True):
        said = model.generate(tiny.ids(1, 9), **PLAIN)
        model.generate(tiny.ids(2, 33, seed=2), prefill_chunk_size=8, **PLAIN)
    table = tiny.resident(folder).get_input_embeddings().weight.detach().float()
    trace = Trace.open(tmp_path / "t")
    assert trace.ids is not None and trace.embeddings is not None
    assert trace.ids[:20].tolist() == said[0, :20].tolist()  # the last one was never read
    expected = table[torch.from_numpy(trace.ids.astype(np.int64))].numpy() @ signs(table.shape[1])
    assert trace.embeddings.shape == (trace.num_tokens, SKETCH)
    assert np.allclose(trace.embeddings, expected, atol=2e-3, rtol=2e-3)


def test_sketches_have_the_cosines_of_what_they_stand_for() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(2000).astype(np.float32)
    for share in (0.0, 0.5, 0.9):
        other = share * base + (1 - share**2) ** 0.5 * rng.standard_normal(2000).astype(np.float32)
        a, b = base @ signs(2000), other @ signs(2000)
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(share, abs=0.3)
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(base), rel=0.3)


def test_a_pass_of_embeddings_is_not_recorded_with_inputs(folder: Path, tmp_path: Path) -> None:
    with tiny.open_model(folder) as model:
        embeddings = model.module.get_input_embeddings()(tiny.ids(1, 4)).detach()
        with (
            pytest.raises(TraceError, match="given embeddings instead of tokens"),
            model.record_trace(tmp_path / "t", inputs=True),
        ):
            model(inputs_embeds=embeddings)
        model(inputs_embeds=embeddings)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("predictor", ["token-ids", "path", "expert-map"])
def test_reading_changes_nothing_but_time(
    folder: Path, tmp_path: Path, device: str, predictor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tiny.ids(1, 9)
    expected = tiny.resident(folder).generate(ids, **PLAIN)
    with tiny.open_model(folder) as model, model.record_trace(tmp_path / "t", inputs=True):
        drive(model)
    rule = {"prefetcher": "read-me(least=0.05)", "profile": tmp_path / "t"}
    with open_model(folder, 9, device=device, predictor=predictor, **rule) as model:
        believes_in_time(always_on(model), monkeypatch)
        manager = model.parts.runtime.manager
        manager.log = log = []
        for _ in range(2):
            assert torch.equal(model.generate(ids, **PLAIN), expected)
        check_books(model)
        drive(model)
        begun = [decision for decision in log if decision.event.layer < 0]
        assert len(begun) == sum(decision.event.layer == 0 for decision in log)
        assert any(fetch.key.layer == 0 for decision in begun for fetch in decision.prefetches)
        again = twin(manager, model.rules)
        prefetcher = manager.prefetcher
        assert prefetcher is not None
        made = model.rules.make_prefetcher(3, 8)
        assert made is not None
        again.prefetcher = Prefetcher(made.predictor, prefetcher.depth, make_rule(model.rules.prefetcher))
        again.prefetcher.switch = None
        believes_in_time(again.prefetcher, monkeypatch)
        assert first_difference(log, again) is None
        model.use_predictor("none")
        assert not model.module.get_input_embeddings()._forward_hooks


def test_a_run_is_told_what_its_trace_says(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[RoutingEvent] = []
    with open_model(folder, 9, predictor="token-ids") as model:
        always_on(model)
        manager = model.parts.runtime.manager
        begin = manager.begin
        monkeypatch.setattr(manager, "begin", lambda event: (told.append(event), begin(event))[1])
        with model.record_trace(tmp_path / "t", inputs=True):
            drive(model)
    openings = [event.opening for event in routing_events(Trace.open(tmp_path / "t")) if event.layer == 0]
    assert len(told) == len(openings)
    for event, opening in zip(told, openings, strict=True):
        assert event.opening is not None and opening is not None and event.opening.ids == opening.ids
        assert np.array_equal(event.opening.embedding, opening.embedding)  # type: ignore[arg-type]


def test_an_error_while_reading_leaves_a_model_that_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny.ids(1, 9)
    expected = tiny.resident(folder).generate(ids, **PLAIN)
    with open_model(folder, 9, predictor="path") as model:
        prefetcher = always_on(model)
        predictor: Any = prefetcher.predictor

        def broken(event: object) -> None:
            raise ZeroDivisionError("of a token")

        with monkeypatch.context() as patched:
            patched.setattr(predictor, "begin", broken)
            with pytest.raises(ZeroDivisionError):
                model.generate(ids, **PLAIN)
        assert torch.equal(model.generate(ids, **PLAIN), expected)
