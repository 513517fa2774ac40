"""Each slice of an expert travels for as long as its own bytes take."""

from __future__ import annotations

import by_hand
import pytest

from cache.types import ExpertKey, Tier
from offload.costs.model import CostModel
from offload.decide.plan import Fetch, LayerPlan
from offload.simulation.engine import SimulatedEngine
from tests.cache.machines import MB, machine

KEY = ExpertKey(0, 0)


@pytest.mark.parametrize(
    ("source", "milliseconds", "read"),
    [
        (Tier.CPU, 6.0 + 3.5, 0.0),  # over the link, one after the other
        (Tier.DISK, 10.1 + max(6.0, 5.0) + 3.5, 1.5),  # the second is read while the first one crosses
    ],
)
def test_slices_take_their_own_time(source: Tier, milliseconds: float, read: float) -> None:
    """The first has 10 MB, the second 5; an expert is computed in a tenth of a millisecond."""
    cost = CostModel(machine(), expert_bytes=10 * MB, tier=Tier.GPU, dense_layer_s=0.0)
    engine = SimulatedEngine(cost, Tier.GPU, sizes=[10 * MB, 5 * MB])
    plan = LayerPlan(by_hand.event(0, [0]))
    plan.waiting = {KEY: (0, 1)}
    plan.fetches = [Fetch(KEY, source, slice=slice_) for slice_ in range(2)]
    seconds, _, landed = engine.run(plan, lambda fetch: None)
    assert seconds == pytest.approx((milliseconds + 0.1) / 1e3) and len(landed) == 2
    time = engine.end_pass(plan.event, seconds)
    assert (time.read, time.copied) == (read, 1.5)
