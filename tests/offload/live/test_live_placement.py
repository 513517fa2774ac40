"""A placement in a live model: what is there at the start, what that changes, and what is kept for the next start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from live_model import open_model

from cache.errors import TraceError, TransferError
from cache.traces.profiles import use_counts
from cache.traces.trace import Trace
from cache.types import Tier
from offload.assembly import assemble, placing
from offload.engine.transfer import TransferEngine
from offload.layers.uses import find_uses
from offload.system.paths import cache_dir

IDS = tiny.ids(1, 9)
GENERATE = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}


@pytest.fixture(autouse=True)
def _own_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save(tmp_path / "model", "mixtral")
    return tmp_path / "model"


@pytest.mark.parametrize("pool", ["global", "layer"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_caches_are_full_at_the_start_and_outputs_the_same(folder: Path, device: str, pool: str) -> None:
    expected = tiny.resident(folder).generate(IDS, **GENERATE)
    with open_model(folder, 9, device=device, pool=pool, placement="random(seed=3)") as model:
        manager = model.parts.runtime.manager
        assert len(manager.computing.resident()) == 9
        held = [set(cache.resident()) for cache in manager.caches]
        assert not set.intersection(*held) or len(held) == 1  # each expert in one tier
        assert model.stats.as_dict()["bytes_from_disk"] == 0 == manager.stats[manager.computing.tier].bytes_in
        assert torch.equal(model.generate(IDS, **GENERATE), expected)
        model.parts.runtime.settle()
        manager.check_integrity()


def test_what_a_profile_used_most_is_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.safetensors"
    with open_model(folder, 9) as model, model.record_trace(path):
        model.generate(IDS, **GENERATE)
    other = tiny.save(tmp_path / "other", "mixtral", num_local_experts=4)
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "_load_dense", lambda *_: pytest.fail("weights were loaded first"))
        with pytest.raises(TraceError, match="name a profile of the same model"):
            tiny.open_model(other, placement="popular", profile=path)
    with open_model(folder, 9, placement="popular", profile=path) as model:
        uses = use_counts(Trace.open(path))
        held = model.parts.runtime.manager.computing.resident()
        least = min(uses[key] for key in held)
        assert len(held) == 9 and sum((uses > least).reshape(-1)) <= 9


def test_what_a_model_used_is_there_when_it_starts_again(folder: Path) -> None:
    with pytest.warns(UserWarning, match="nothing is known of this model's use yet"):
        model = open_model(folder, 9, placement="popular")
    with model:
        assert model.parts.runtime.manager.computing.resident() == []
        model.generate(IDS, **GENERATE)
        uses = model.parts.runtime.manager.uses
        assert find_uses(model.module, model.parts.experts) is None
    with open_model(folder, 9, placement="popular") as again:
        kept = find_uses(again.module, again.parts.experts)
        assert kept is not None and kept.tolist() == uses
        assert len(again.parts.runtime.manager.computing.resident()) == 9
        again.generate(IDS, **GENERATE)
        more = again.parts.runtime.manager.uses
    with open_model(folder, 9) as model:
        kept = find_uses(model.module, model.parts.experts)
        assert kept is not None and (kept == np.array(more) + np.array(uses) // 2).all()


def test_damaged_uses_are_no_uses(folder: Path) -> None:
    with open_model(folder, 9) as model:
        model.generate(IDS, **GENERATE)
    (path,) = (cache_dir() / "calibrations").glob("*.uses.safetensors")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.warns(UserWarning, match="nothing is known"):
        open_model(folder, 9, placement="popular").close()


def test_a_folder_that_cannot_be_written_to_keeps_nothing_and_says_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "file"))
    with open_model(folder, 9) as model:
        model.generate(IDS, **GENERATE)


@pytest.mark.parametrize("progress", [False, True])
def test_ctrl_c_skips_the_rest_where_it_is_shown(folder: Path, progress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "_AT_ONCE", 2)
    submit, begun = TransferEngine.submit, []

    def interrupted(engine: TransferEngine, fetches: Any) -> None:
        submit(engine, fetches)
        begun.append(len(fetches))
        if len(begun) == 2:
            raise KeyboardInterrupt

    with open_model(folder, 9) as model:
        runtime = model.parts.runtime
        order = [key for key in _all_keys(model) if key not in runtime.manager.computing.resident()]
        monkeypatch.setattr(TransferEngine, "submit", interrupted)
        try:
            placing.fill_caches(runtime, order, progress=progress)
        except KeyboardInterrupt:
            assert not progress
        monkeypatch.undo()
        runtime.settle()
        runtime.manager.check_integrity()
        assert 2 <= len(runtime.manager.computing.resident()) <= 4
        model.generate(IDS, **GENERATE)


def test_a_disk_that_fails_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(folder, 9) as model:
        runtime = model.parts.runtime

        def broken(*_: Any) -> int:
            raise OSError("gone")

        monkeypatch.setattr(type(runtime.engine._disk), "_read", broken)
        with pytest.raises(TransferError, match="gone"):
            placing.fill_caches(runtime, _all_keys(model), progress=False)
        monkeypatch.undo()
        runtime.settle()
        runtime.manager.check_integrity()
        assert runtime.engine.held(Tier.CPU, 0) == set()


def _all_keys(model: Any) -> list[Any]:
    return placing.make_placement("random", model.plan.layers, model.parts.experts.num_experts).order(None)
