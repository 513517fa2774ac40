"""The mixture as package data: a checkpoint is written of it once, and it routes as its trace says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cache.errors import CheckpointError
from cache.traces.trace import Trace
from offload import OffloadedModel
from offload.demo import mixture


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_mixture_is_written_once_and_routes_as_its_trace_says(cache: Path, tmp_path: Path) -> None:
    folder = mixture.mixture_path()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert folder.parent == cache and mixture.mixture_path() == folder
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    trace = Trace.open(mixture.TRACE)
    assert trace.ids is not None
    first = slice(0, int((trace.step[: trace.sequence_offsets[1]] == 0).sum()))
    with OffloadedModel.from_pretrained(folder) as model:
        with model.record_trace(tmp_path / "t", inputs=True):
            model(torch.from_numpy(trace.ids[first].astype(np.int64))[None])
        text = model.tokenizer.decode(trace.ids[first])
    again = Trace.open(tmp_path / "t")
    same = (np.sort(again.experts, -1) == np.sort(trace.experts[first], -1)).all(-1).mean()
    assert same > 0.95, same  # another processor rounds otherwise
    assert len(text) > 40 and " " in text


def test_the_trace_has_all_that_claims_are_measured_by() -> None:
    trace = Trace.open(mixture.TRACE)
    assert (trace.num_layers, trace.num_experts, trace.top_k) == (12, 32, 4)
    assert trace.scores is not None and trace.predicted is not None and trace.embeddings is not None
    assert trace.predicted.shape[2] == 3 and trace.num_sequences >= 6
    assert mixture.TRACE.stat().st_size + mixture.WEIGHTS.stat().st_size <= 12_000_000


def test_an_installation_without_its_data_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "WEIGHTS", mixture.WEIGHTS.with_name("gone.safetensors"))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is not there: reinstall offload"):
        mixture.mixture_path()
