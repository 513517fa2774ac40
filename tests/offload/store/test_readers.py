"""How many threads read: what the disk gains by, no fewer than two, and the engine has as many."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import tiny
import torch

from offload.costs.machine import BlockReads
from offload.engine.transfer import Traffic
from offload.store import readers
from offload.store.readers import READERS, readers_for

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)

MB = 2**20


def blocks(**rates: list[float]) -> list[BlockReads]:
    """Rates by 1, 2, 4 and 8 threads, by block size."""
    return [
        BlockReads(int(size[1:]) * 2**18, threads, rate)
        for size, of_size in rates.items()
        for threads, rate in zip((1, 2, 4, 8), of_size, strict=True)
    ]


def test_no_more_than_the_disk_gains_by() -> None:
    measured = blocks(_1=[1.0, 1.4, 1.8, 1.9], _4=[1.6, 1.7, 1.75, 1.7], _64=[1.0, 2.0, 3.0, 6.0])
    assert readers_for(measured, 300_000) == 4  # eight are less than a tenth faster
    assert readers_for(measured, MB) == READERS == 2  # one would do
    assert readers_for(measured, 100 * MB) == 8
    assert readers_for([], MB) == READERS


def test_an_engine_has_as_many_as_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save(tmp_path / "model", "mixtral", torch.bfloat16)
    logits = []
    for measured in ([], blocks(_1=[1.0, 2.0, 4.0, 4.0])):
        monkeypatch.setattr(readers, "readers_here", lambda nbytes, measured=measured: readers_for(measured, nbytes))
        monkeypatch.setattr("offload.plan.demand.readers_here", readers.readers_here)
        with tiny.open_model(folder, device="cpu") as model:
            names = {thread.name for thread in threading.enumerate() if thread.name.startswith("offload-read-")}
            assert len(names) == model.plan.readers == 4
            assert model.plan.places == 2  # what is read is copied out: two for each
            assert f"{model.plan.readers} reads at once" in {item.note for item in model.plan.items}
            logits.append(model(tiny.ids(1, 12)).logits)
    assert tiny.same_bits(*logits)


def test_without_a_profile_or_with_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "machine_profile_path", lambda: tmp_path / "machine.json")
    assert readers.readers_here(MB) == READERS
    (tmp_path / "machine.json").write_text("{}")
    assert readers.readers_here(MB) == READERS


def test_reads_at_the_same_time_count_once() -> None:
    traffic = Traffic()
    start = time.perf_counter()
    for readers_busy in (1, 2):
        for _ in range(readers_busy):
            traffic.begin_read()
        time.sleep(0.02)
        for _ in range(readers_busy):
            traffic.end_read()
        time.sleep(0.02)  # nobody reads: that does not count
    took = time.perf_counter() - start
    assert 0.04 <= traffic.totals()[1] <= took - 0.04
