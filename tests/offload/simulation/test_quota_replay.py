"""Replays of traces whose layers share by a quota."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_trace import make_trace

from cache.errors import PolicyError
from offload.simulation.compare import replay
from tests.cache.machines import machine


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 layers, top-2 of 8."""
    file = tmp_path_factory.mktemp("shared") / "made.safetensors"
    make_trace().write(file)
    return file


@pytest.mark.parametrize("quota", ["shallow", "dp", "distinct"])
def test_timed_rows_share_as_counted_ones(path: Path, quota: str) -> None:
    settings: dict[str, Any] = {"quota": quota, "profile": path, "machine": machine()}
    counted = replay(path, ["lfru"], ["25%", "50%"], **settings)
    timed = replay(path, ["lfru"], ["25%", "50%"], timed=True, **settings)
    assert [(row.quota, row.hits) for row in counted] == [(quota, row.hits) for row in timed]
    assert [row.capacity_slots for row in counted] == [8, 16] * 4


@pytest.mark.parametrize(("quota", "warm"), [("dp", True), ("distinct", True), ("plec(rate=.2, uses=4)", False)])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_learns_as_it_goes_is_replayed_by_the_clock(path: Path, quota: str, warm: bool, device: str) -> None:
    settings: dict[str, Any] = {"timed": True, "warm": warm, "device": device, "host_capacity": "75%"}
    rows = replay(path, ["lru"], ["50%"], quota=quota, machine=machine(), **settings)
    assert all(row.hits + row.misses == 120 * 4 * 2 and row.hits > 0 for row in rows)
    assert [row.quota for row in rows] == [quota] * 3


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"quota": "fair"}, "no quota is called"),
        ({"quota": "dp", "pool": "global"}, "--quota dp divides .* --pool global"),
        ({"quota": "dp"}, "--timed --warm, or name a --profile"),
        ({"quota": "plec"}, "replay with --timed$"),
        ({"quota": "dp", "timed": True}, "--timed --warm, or name a --profile"),
    ],
)
def test_what_means_nothing_is_refused(path: Path, setting: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        replay(path, machine=machine(), **setting)
