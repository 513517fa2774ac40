"""The log of decisions, decided again."""

from __future__ import annotations

import by_hand
from logs import first_difference

from cache.types import ExpertKey, Tier
from offload.decide.manager import Manager
from offload.decide.stacks import Stacks


def test_failed_transfers_are_part_of_the_log() -> None:
    manager = Manager(Stacks.single([by_hand.cache_of(Tier.CPU, 2, 64, 1, 8)], 64))
    manager.log = log = []
    for step, experts in enumerate([(0, 1), (2, 1), (0, 3), (2, 3), (1, 0)]):
        plan = manager.step(by_hand.event(0, experts, step))
        for fetch in (*plan.fetches, *plan.late_fetches):
            if fetch.key == ExpertKey(0, 2):
                manager.failed(fetch)
            else:
                manager.arrived(fetch, 64)
        manager.finish()
    assert any(not arrived for decision in log for _, _, arrived in decision.completions)
    assert first_difference(log, Manager(Stacks.single([by_hand.cache_of(Tier.CPU, 2, 64, 1, 8)], 64))) is None
