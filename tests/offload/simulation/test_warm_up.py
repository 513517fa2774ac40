"""`--warm-up`: what is replayed first, and not counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_trace import make_trace

from cache.counting.schedule import warm_up_passes
from cache.errors import TraceError
from cache.traces.trace import Trace
from offload.decide.presets import PRESETS
from offload.simulation.compare import replay
from offload.simulation.rows import Setting
from offload.simulation.systems import replay_preset
from tests.cache.machines import machine


def hits(trace: Trace, **settings: Any) -> dict[str, tuple[int, int, int]]:
    """By policy, of a warm replay."""
    found = replay(trace, ["lfru", "lfu", "mrs"], "50%", warm=True, **settings)
    return {row.policy: (row.accesses, row.hits, row.bypasses) for row in found if row.causal}


@pytest.mark.parametrize("pool", ["layer", "global"])
def test_it_is_the_whole_less_the_first_sequences(pool: str) -> None:
    trace = make_trace()
    whole, first = hits(trace, pool=pool), hits(trace.select([0]), pool=pool)
    found = hits(trace, pool=pool, warm_up=1)
    assert found["lfru"][0] == 2 * 40 * 4 * 2
    for policy, counted in found.items():
        assert counted == tuple(a - b for a, b in zip(whole[policy], first[policy], strict=True))
    assert hits(trace, pool=pool, warm_up=0) == whole


def test_counting_and_the_clock_leave_out_the_same() -> None:
    settings: dict[str, Any] = {"warm": True, "warm_up": 2, "machine": machine()}
    counted, timed = (replay(make_trace(), ["lfru", "lfu"], "50%", timed=way, **settings) for way in (False, True))
    for a, b in zip(counted, timed, strict=True):
        assert (a.policy, a.accesses, a.hits, a.warm_up) == (b.policy, b.accesses, b.hits, 2)
        if a.admission == "forced":
            assert a.tokens_per_s == pytest.approx(b.tokens_per_s) and a.stall_s == pytest.approx(b.stall_s)


def test_presets_leave_them_out_too() -> None:
    trace = make_trace()
    given = Setting(timed=True, machine=machine(), warm=True)
    (whole,), (found,), (first,) = (
        replay_preset(each, PRESETS["d2moe"], ["25%"], setting)
        for each, setting in ((trace, given), (trace, replace(given, warm_up=1)), (trace.select([0]), given))
    )
    assert found.accesses == whole.accesses - first.accesses == 2 * 40 * 4 * 2 and found.warm_up == 1
    assert found.stall_s == pytest.approx(whole.stall_s - first.stall_s)
    seconds = 120 / whole.tokens_per_s - 40 / first.tokens_per_s
    assert found.tokens_per_s == pytest.approx(80 / seconds)
    assert sum(found.precision_shares.values()) == pytest.approx(1)


def test_of_a_batch_all_are_left_out() -> None:
    forward = np.array([0, 1, 0, 1, 2, 3])  # the first two sequences run together
    experts = np.zeros((6, 1, 1))
    trace = Trace.from_arrays(experts, np.ones((6, 1, 1)), [0, 2, 4, 6], num_experts=4, forward=forward)
    assert [warm_up_passes(trace, sequences) for sequences in (0, 1, 2)] == [0, 2, 2]
    with pytest.raises(TraceError, match="none is left to count"):
        warm_up_passes(trace, 3)


def test_it_is_for_warm_replays(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="--warm-up does nothing with --cold"):
        replay(make_trace(), warm_up=1)
    with pytest.raises(Exception, match="0 or more"):
        replay(make_trace(), warm=True, warm_up=-1)
