"""A policy that misbehaves is named, and changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cache.errors import PolicyError
from cache.lanes import Lanes
from cache.policy import EvictionPolicy
from cache.residency import ExpertCache
from cache.types import ExpertKey, Tier


class Wrong(EvictionPolicy):
    answer: NDArray[Any]

    def priorities(self, lanes: slice) -> NDArray[Any]:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (np.zeros((2, 3)), r'"Wrong" gave priorities of shape \(2, 3\), not \(1, 6\)'),
        (np.full((1, 6), np.nan), "not a number"),
    ],
)
def test_nonsense_priorities_are_refused_and_change_nothing(answer: NDArray[Any], complaint: str) -> None:
    policy = Wrong(Lanes.shared(2, 3))
    policy.answer = answer
    cache = ExpertCache(Tier.CPU, [2], policy)
    for expert in range(2):
        cache.reserve(ExpertKey(0, expert), 1)
        cache.commit(ExpertKey(0, expert))
    with pytest.raises(PolicyError, match=complaint):
        cache.reserve(ExpertKey(1, 0), 1)
    cache.check_integrity(idle=True)
    assert len(cache.resident()) == 2
