"""Several traces as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from traces import batched_trace, random_trace, with_everything

from cache.errors import TraceError
from cache.traces.concatenate import concatenate
from cache.traces.passes import routing_events
from cache.traces.trace import Trace


@pytest.mark.parametrize("make", [random_trace, with_everything])
def test_joined_traces_give_the_same_events(make: Callable[[int], Trace], tmp_path: Path) -> None:
    trace = make(1)
    parts = [trace.select([trace.num_sequences - 1]), trace.select(range(2))]
    joined = concatenate(parts, tmp_path / "t")
    joined.check()
    assert joined.num_sequences == 3
    strip = [(e.layer, e.experts, e.weights, e.tokens, e.phase) for e in routing_events(joined)]
    assert strip == [(e.layer, e.experts, e.weights, e.tokens, e.phase) for t in parts for e in routing_events(t)]


def test_joining_batches_and_others(tmp_path: Path) -> None:
    batches, others = batched_trace(), random_trace()
    joined = concatenate([others, batches, others], tmp_path / "t")
    joined.check()
    assert joined.forward is not None
    single = [event.experts for t in (others, batches, others) for event in routing_events(t)]
    assert [event.experts for event in routing_events(joined)] == single


def test_what_cannot_be_joined(tmp_path: Path) -> None:
    trace = with_everything()
    with pytest.raises(TraceError, match="has no scores, others have"):
        concatenate([trace, replace(trace, scores=None)], tmp_path / "t")
    with pytest.raises(TraceError, match="num_experts is 6 and 7"):
        concatenate([random_trace(), random_trace(experts=7)], tmp_path / "t")
    with pytest.raises(TraceError, match="model is unknown and other"):
        concatenate([random_trace(), random_trace(metadata={"model": "other"})], tmp_path / "t")
    with pytest.raises(TraceError, match="predicted of different shapes"):
        concatenate([trace, replace(trace, predicted=trace.predicted[:, :, :1])], tmp_path / "t")  # type: ignore[index]
    assert not list(tmp_path.iterdir())


def test_joined_metadata_keeps_what_is_common(tmp_path: Path) -> None:
    first, second = (random_trace(metadata={"workload": name, "dtype": "float32"}) for name in ("chat", "code"))
    joined = concatenate([first, second], tmp_path / "t")
    assert joined.workload == "chat + code" and joined.metadata["dtype"] == "float32"
