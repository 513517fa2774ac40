"""The quota that keeps the first layers whole, where it just can."""

from __future__ import annotations

from cache.quota import even, shallow


def test_the_others_keep_at_least_half_of_their_share() -> None:
    assert shallow(16, 8, 9) == [9] + [1] * 7  # just half of 2 each
    assert shallow(16, 8, 10) == even(16, 8, 10) == [2] * 8  # it would be less
