"""The learned predictor: it sees live what it was trained on, finds what is there to find, and survives its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import batched_trace, random_trace, recorded

from cache.errors import PolicyError, TraceError
from cache.traces.passes import routing_events
from cache.traces.tensorfile import Column, write_tensors
from cache.traces.trace import Trace
from offload.system import quiet
from offload.terminal import main as cli
from predictors.base import make_predictor
from predictors.forecast import Regressions, named, num_features
from predictors.learned import Learned
from predictors.training import Passes, fit


def predicted(trace: Trace, distances: int = 2, width: int = 4) -> Trace:
    """With random predictions."""
    rng = np.random.default_rng(0)
    shape = (trace.num_tokens, trace.num_layers, distances, trace.num_experts)
    return replace(trace, predicted=rng.random(shape).argsort(-1)[..., :width].astype(np.uint8))


def chain(tokens: int = 300, experts: int = 8) -> Trace:
    """Each layer uses the expert after the last layer's; which one the first uses is random."""
    first = np.random.default_rng(0).integers(0, experts, tokens)
    ids = (first[:, None] + np.arange(4)) % experts
    offsets = np.arange(0, tokens + 1, 50)
    return Trace.from_arrays(ids[..., None], np.ones((tokens, 4, 1)), offsets, num_experts=experts)


@pytest.mark.parametrize("trace", [random_trace(layers=3), batched_trace(layers=3), predicted(batched_trace(layers=3))])
def test_it_sees_live_what_it_was_trained_on(trace: Trace) -> None:
    window, passes = 2, Passes(trace)
    features = {
        (layer, distance): np.concatenate(
            [block for block, _ in passes.examples(layer, distance, window, np.ones(len(passes.tokens), bool))]
        )
        for layer in range(3)
        for distance in range(1, 3 - layer)  # within the pass, so that none is left out
    }
    ahead = trace.predicted is not None
    weights = np.zeros((3, 3, num_features(6, window, ahead), 6), np.float16)
    predictor = Learned(3, 6)
    curves = np.zeros((3, 41), np.float32)
    predictor._use(Regressions(weights, curves, window, trace.top_k, ahead), 3, 6, "tests")
    predictor.reset()
    assert predictor.looks_ahead == ahead
    for index, event in enumerate(routing_events(trace)):
        predictor.observe(event)
        for distance in range(1, 3 - event.layer):
            said = named(event.ahead, distance, 6, trace.top_k) if ahead else None
            seen = predictor._state.features(event.layer, distance, said)
            assert np.allclose(seen, features[event.layer, distance][index // 3], atol=1e-6)


def test_it_finds_what_is_there_to_find() -> None:
    """Within a pass all is known; across its end nothing is."""
    trace = chain()
    _, compared = fit([trace], hold_out=3)
    for row in compared:
        known = (4 - row.distance) / 4
        assert known <= row.learned[0] <= known + 0.25 * row.distance and row.frequency[0] < 0.25
    predictor = make_predictor("learned", 4, 8, trace.select(range(4)))
    hits, sure = {1: 0, 2: 0}, []
    events = list(routing_events(trace.select([5])))
    for i, event in enumerate(events[:-2]):
        predictor.observe(event)
        for distance in hits if event.layer < 2 else ():
            best = next(p for p in predictor.predict(2) if p.lead_layers == distance)
            assert best.key.layer == event.layer + distance
            hits[distance] += events[i + distance].experts == (best.key.expert,)
            sure.append(best.probability)
    assert min(hits.values()) >= 97  # of 100; at first it has seen too little
    assert np.mean(sure) > 3 / 8  # by chance it would be one of eight


def test_many_tokens_need_more() -> None:
    """Of n tokens an expert with a share is needed with the probability 1 - (1 - share)^n."""
    predictor = make_predictor("learned", 4, 8, chain())
    event = next(iter(routing_events(chain())))
    shares = {}
    for tokens in (1, 3):
        predictor.reset()
        predictor.observe(event._replace(tokens=(tokens,)))
        shares[tokens] = {p.key: p.probability for p in predictor.predict(1)}
    for key, share in shares[1].items():
        assert shares[3][key] == pytest.approx(1 - (1 - share) ** 3)


def test_a_gate_that_looked_ahead_is_believed_when_it_was_right() -> None:
    trace = random_trace(lengths=(50,) * 6, layers=3, ties=False)
    right = np.zeros((trace.num_tokens, 3, 1, 4), np.uint8)
    right[:, :2, 0, :2] = trace.experts[:, 1:]
    right[:, :2, 0, 2:] = [0, 5]
    _, without = fit([trace], depth=1, hold_out=3)
    learned, compared = fit([replace(trace, predicted=right)], depth=1, hold_out=3)
    assert learned.ahead and compared[0].learned[0] > without[0].learned[0] + 0.2
    mixed, _ = fit([replace(trace, predicted=right), trace])
    assert not mixed.ahead


def test_held_out_recall_on_a_real_trace() -> None:
    trace = recorded("gpt-oss-20b.mmlu.small")
    _, compared = fit([trace], hold_out=5)
    for row in compared:
        assert row.frequency[0] < row.recent[0] < 0.5 < 0.68 < row.learned[0] < row.learned[1]


# The file.


def test_a_file_predicts_what_was_learned(tmp_path: Path) -> None:
    trace = predicted(random_trace(lengths=(30, 20), layers=3))
    learned, _ = fit([trace])
    learned.write(tmp_path / "f")
    predictor = make_predictor(f'learned(file="{tmp_path / "f"}", floor=0.0)', 3, 6)
    fresh = make_predictor("learned(floor=0.0)", 3, 6, trace)
    assert predictor.looks_ahead and not predictor.learns and fresh.learns
    for event in routing_events(trace):
        predictor.observe(event)
        fresh.observe(event)
        assert predictor.predict(3) == fresh.predict(3)
    assert {prediction.lead_layers for prediction in predictor.predict(9)} == {1, 2, 3}
    with pytest.raises(PolicyError, match="learned from a model of 3 layers of 6 experts, not 4 of 6"):
        make_predictor(f'learned(file="{tmp_path / "f"}")', 4, 6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other"}, "is not what `offload train-predictor` stores"),
        ({"window": "5"}, "is damaged"),
        ({"window": "many"}, "is damaged"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, change: dict[str, str], reason: str) -> None:
    metadata: dict[str, str] = {
        "format": "offload-predictor",
        "version": "1",
        "top_k": "2",
        "window": "2",
        "ahead": "0",
    }
    weights = np.zeros((3, 1, num_features(6, 2, False), 6), np.float16)
    curves = np.zeros((1, 41), np.float32)
    columns = {name: Column(a.dtype, a.shape, [a]) for name, a in (("weights", weights), ("curves", curves))}
    write_tensors(tmp_path / "f", columns, metadata | change)
    with pytest.raises(PolicyError, match=reason):
        make_predictor(f'learned(file="{tmp_path / "f"}")', 3, 6)


def test_what_cannot_be_learned(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        make_predictor(f'learned(file="{tmp_path / "nothing"}")', 3, 6)
    with pytest.raises(PolicyError, match="learns from a recorded trace"):
        make_predictor("learned", 3, 6)
    with pytest.raises(TraceError, match="do not belong together: num_layers is 2 and 3"):
        fit([random_trace(), random_trace(layers=3)])
    with pytest.raises(TraceError, match="no sequence left to compare on: record more than 9"):
        fit([random_trace()], hold_out=9)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(quiet, "prepare", lambda: None)  # it sets up the whole process
    chain().write(tmp_path / "t")
    for flags in ([], ["--json", "--depth", "2", "--hold-out", "3"]):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["train-predictor", str(tmp_path / "t"), "-o", str(tmp_path / "f"), *flags])
        shown = capsys.readouterr()
        assert not leaving.value.code, shown.err
        assert Regressions.read(tmp_path / "f").shape == (4, 8)
        assert shown.err.count("so it looks") == 0
        if flags:
            rows = json.loads(shown.out)["recall"]
            assert [row["distance"] for row in rows] == [1, 2] and rows[0]["learned"][0] > 0.7
        else:
            assert shown.out.count("%") == 18 and "learned(file=" in shown.err


def test_more_layers_than_there_are_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(quiet, "prepare", lambda: None)
    chain().write(tmp_path / "t")
    with pytest.raises(SystemExit):
        flags = ["-o", str(tmp_path / "f"), "--depth", "5", "--window", "7"]
        cli.main(["train-predictor", str(tmp_path / "t"), *flags])
    err = capsys.readouterr().err
    assert "--depth 5: " in err and "has 4 layers, so it looks 4 ahead" in err
    assert "--window 7: " in err and "has 4 layers, so it looks 4 back" in err
