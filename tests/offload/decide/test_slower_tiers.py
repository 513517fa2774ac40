"""What the accelerator uses counts in RAM, too: what it drops, RAM should still have."""

from __future__ import annotations

import by_hand
from one_precision import K, manager_of, run

from cache.types import Tier


def test_ram_hears_of_what_the_accelerator_held_itself() -> None:
    manager = manager_of(2, 2)
    for expert in (0, 1):
        run(manager, by_hand.event(0, [expert]))
    assert run(manager, by_hand.event(0, [0])).fetches == []  # a hit, that asks RAM for nothing
    (fetch,) = run(manager, by_hand.event(0, [2])).fetches
    assert fetch.evicted == {Tier.GPU: [K(0, 1)], Tier.CPU: [K(0, 1)]}  # 0 was used since
