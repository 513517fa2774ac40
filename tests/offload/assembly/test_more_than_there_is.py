"""More threads than cores, more layers ahead than there are, parts that have nothing to do: left out, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from cache.errors import DeviceError, PolicyError
from cache.traces.trace import Trace
from offload.device.emulated import link_rate
from offload.system import cores


def test_more_threads_than_cores_are_as_many_as_cores(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    for asked in (64, 10**30):  # of which torch would die
        with pytest.warns(UserWarning, match=rf"^--threads {asked}: this program may use 2 cores here, so as many"):
            model = tiny.open_model(checkpoint, threads=asked)
        with model:
            assert torch.get_num_threads() == 2
    with tiny.open_model(checkpoint, threads=2):
        assert torch.get_num_threads() == 2


def test_a_depth_beyond_all_layers_is_all_layers(checkpoint: Path) -> None:
    said = r"^--prefetch-depth 50: the model has 3 MoE layers, so it looks 3 ahead$"
    with pytest.warns(UserWarning, match=said):
        model = tiny.open_model(checkpoint, expert_cache=tiny.FEW, predictor="frequency", prefetch_depth=50)
    with model:
        prefetcher = model.parts.runtime.manager.prefetcher
        assert prefetcher is not None and prefetcher.depth == 3
        model.use_predictor("frequency", depth=3)
        with pytest.warns(UserWarning, match=said):
            model.use_predictor("frequency", depth=50)


@pytest.mark.parametrize("option", [{"prefetch_depth": 2}, {"prefetcher": "fate"}])
def test_how_to_fetch_ahead_is_said_to_be_nothing_where_nothing_is_fetched(
    checkpoint: Path, option: dict[str, Any]
) -> None:
    (flag,) = option
    said = rf"^--{flag.replace('_', '-')} .* does nothing: nothing is fetched ahead, since all experts fit"
    with pytest.warns(UserWarning, match=said):
        tiny.open_model(checkpoint, **option).close()
    with pytest.warns(UserWarning, match="nothing is fetched ahead, since the fallback is lossy"):
        tiny.open_model(checkpoint, expert_cache=tiny.FEW, fallback="cache-prior", **option).close()
    tiny.open_model(checkpoint, expert_cache=tiny.FEW, **option).close()


def test_gates_further_ahead_than_there_are_layers_are_not_recorded(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    with tiny.open_model(checkpoint) as model:
        with pytest.warns(UserWarning, match="^--predicted 9: the model has 3 MoE layers, and gates look at most 2 a"):
            recording = model.record_trace(path, predicted=9)
        with recording:
            model.generate(tiny.ids(1, 4), max_new_tokens=3, do_sample=False)
    predicted = Trace.open(path).predicted
    assert predicted is not None and predicted.shape[2] == 2


def test_a_profile_that_nobody_learns_from_is_said(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    with tiny.open_model(checkpoint) as model, model.record_trace(path):
        model.generate(tiny.ids(1, 4), max_new_tokens=3, do_sample=False)
    with pytest.warns(
        UserWarning, match=r"^--profile .*: of the policy, quota, predictor and placement that run, none"
    ):
        tiny.open_model(checkpoint, policy="lru", profile=path).close()
    tiny.open_model(checkpoint, placement="popular", profile=path).close()
    tiny.open_model(checkpoint, quota="dp", profile=path).close()


def test_a_presets_scheduler_without_an_accelerator_is_said(checkpoint: Path) -> None:
    with pytest.warns(
        UserWarning, match="^--preset freetoken runs without its scheduler ratio: the CPU computes every"
    ):
        tiny.open_model(checkpoint, preset="freetoken").close()
    tiny.open_model(checkpoint, preset="freetoken", device="emulated").close()
    with pytest.raises(PolicyError, match="--scheduler ratio divides layers"):
        tiny.open_model(checkpoint, scheduler="ratio")


def test_a_scheduler_for_comparisons_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PolicyError, match="--scheduler optimal tries all splits of a layer"):
        tiny.open_model(checkpoint, scheduler="optimal", device="emulated")


@pytest.mark.parametrize("link", ["1B/s", "999KB/s", 1.0])
def test_a_link_on_which_nothing_arrives_is_refused(link: str | float) -> None:
    with pytest.raises(DeviceError, match="give at least 1MB/s"):
        link_rate(link)
    assert link_rate("1MB/s") == 1e6
