"""Counted one use at a time, policies miss as often as in libCacheSim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import SMALL, recorded

from cache.counting.counting import count
from cache.lanes import Ints
from cache.policies.lfu import LFU
from cache.traces.trace import Trace


class InCacheLFU(LFU):
    """LFU that forgets an expert's uses when it goes, as libCacheSim's does; ours remembers them."""

    def on_evict(self, at: Ints) -> None:
        self.uses.reshape(-1)[at] = 0


LIBCACHESIM = {
    "fifo": "FIFO",
    "lru": "LRU",
    f"{__name__}:InCacheLFU": "LFU",
    "slru": "SLRU",
    "arc": "ARC",
    "sieve": "Sieve",
    # Its small queue needs two places before it takes anything: its own share of a tenth has too few below 20 slots.
    "s3fifo(small=0.25)": "S3FIFO",
}


def libcachesim_misses(name: str, requests: Ints, slots: int, folder: Path, **parameters: Any) -> int:
    """What libCacheSim counts for one cache of `slots` objects of size 1."""
    libcachesim = pytest.importorskip("libcachesim")
    record = [("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")]
    rows = np.zeros(len(requests), record)
    rows["id"], rows["size"], rows["next"] = requests + 1, 1, -2
    rows.tofile(folder / "requests")
    reader = libcachesim.TraceReader(str(folder / "requests"), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
    cache = getattr(libcachesim, name)(slots, hashpower=8, **parameters)
    return round(cache.process_trace(reader)[0] * len(requests))


def compare(trace: Trace, spec: str, name: str, slots: int, folder: Path, **parameters: Any) -> None:
    order = np.lexsort((trace.experts, trace.weights))
    touched = np.take_along_axis(trace.experts, order, axis=2)
    theirs = sum(
        libcachesim_misses(name, touched[:, layer].ravel().astype(np.int64), slots, folder, **parameters)
        for layer in range(trace.num_layers)
    )
    ours = count(trace, spec, [[slots] * trace.num_layers], cold=False, one_by_one=True)[0]
    assert ours.accesses == trace.experts.size
    assert ours.misses == theirs


def small_trace() -> Trace:
    pytest.importorskip("libcachesim")
    return recorded(SMALL)


@pytest.mark.parametrize("spec", LIBCACHESIM)
def test_two_sequences_miss_as_in_libcachesim(spec: str, tmp_path: Path) -> None:
    parameters = {"small_size_ratio": 0.25} if "s3fifo" in spec else {}
    compare(small_trace().select(range(2)), spec, LIBCACHESIM[spec], 12, tmp_path, **parameters)


@pytest.mark.full
@pytest.mark.parametrize("slots", [8, 12, 16])
@pytest.mark.parametrize("spec", LIBCACHESIM)
def test_the_small_trace_misses_as_in_libcachesim(spec: str, slots: int, tmp_path: Path) -> None:
    parameters = {"small_size_ratio": 0.25} if "s3fifo" in spec else {}
    compare(small_trace(), spec, LIBCACHESIM[spec], slots, tmp_path, **parameters)


@pytest.mark.full
@pytest.mark.parametrize("slots", [20, 24, 28])
def test_s3fifo_s_defaults_miss_as_in_libcachesim(slots: int, tmp_path: Path) -> None:
    compare(small_trace(), "s3fifo", "S3FIFO", slots, tmp_path)
