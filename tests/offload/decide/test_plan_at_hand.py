"""When a plan has all that its event needs at hand."""

from __future__ import annotations

from typing import Any

import pytest

from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.decide.plan import Fetch, LayerPlan

KEY = ExpertKey(0, 1)


def plan() -> LayerPlan:
    made = LayerPlan(RoutingEvent(1, 0, 0, Phase.DECODE, (1, 2), (0.5, 0.5), (1, 1)))
    made.resident = list(made.keys)
    return made


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resident", [KEY]),
        *((name, [Fetch(KEY, Tier.DISK)]) for name in ("fetches", "late_fetches", "prefetches", "cancelled")),
        ("awaited", [KEY]),
        ("on_cpu", [KEY]),
        ("precisions", {KEY: 1}),
        ("replaced", {KEY: ExpertKey(0, 3)}),
        ("error", ValueError()),
    ],
)
def test_whatever_else_is_to_do_counts(field: str, value: Any) -> None:
    made = plan()
    assert made.at_hand
    setattr(made, field, value)
    assert not made.at_hand
