"""Starting over after an error that nobody foresaw: when it has to be, and what it takes, in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cache.types import ExpertKey, Tier
from offload.engine.starting_over import in_order, start_over

HERE, THERE = ExpertKey(0, 1), ExpertKey(0, 2)


class Recorder:
    """Notes what is called by name."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, name: str) -> Any:
        return lambda: self.calls.append(name)


@pytest.mark.parametrize("whole", [True, False])
def test_everything_starts_over_and_the_cpus_thread_first(whole: bool) -> None:
    """What that thread is at gives places back to the engine; caches are filled again once all is empty."""
    note = Recorder()
    runtime: Any = SimpleNamespace(
        host=SimpleNamespace(restart=note("host")) if whole else None,
        engine=SimpleNamespace(restart=note("engine")),
        manager=SimpleNamespace(start_over=note("manager")),
        fused=SimpleNamespace(forget=note("fused")) if whole else None,
        forget=note("events"),
        refill=note("refill"),
    )
    start_over(runtime)
    first, *between, last = note.calls
    assert first == ("host" if whole else "engine") and last == "refill"
    assert sorted([first, *between]) == sorted(["engine", "manager", "events", *(["host", "fused"] if whole else [])])


@pytest.mark.parametrize(
    ("held", "integrity", "order"),
    [({HERE}, True, True), ({HERE, THERE}, True, False), (set(), True, False), ({HERE}, False, False)],
)
def test_in_order_is_what_holds_together_and_is_held(held: set[ExpertKey], integrity: bool, order: bool) -> None:
    def check_integrity() -> None:
        if not integrity:
            raise RuntimeError("a slot is in use twice")

    cache = SimpleNamespace(tier=Tier.CPU, resident=lambda: [HERE])
    manager: Any = SimpleNamespace(check_integrity=check_integrity, stacks=SimpleNamespace(by_slice=[[cache]]))
    engine: Any = SimpleNamespace(held=lambda tier, slice_: held if (tier, slice_) == (Tier.CPU, 0) else {THERE})
    assert in_order(manager, engine) is order
