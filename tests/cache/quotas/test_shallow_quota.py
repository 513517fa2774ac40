"""The quota that keeps the first layers whole, where it just can."""

from __future__ import annotations

from cache.quota import even, make_quota


def shallow(total: int, layers: int, experts: int) -> list[int]:
    return make_quota("shallow", layers, experts).slots(total)


def test_the_first_layers_are_whole() -> None:
    assert shallow(192, 24, 32) == [32] * 3 + [5] * 12 + [4] * 9
    # Two whole layers leave 13 slots to 22 layers, less than half of the even 3 each; one leaves 45.
    assert shallow(77, 24, 32) == [32] + [2] * 22 + [1]
    assert shallow(20, 24, 32) == even(20, 24, 32)


def test_the_others_keep_at_least_half_of_their_share() -> None:
    assert shallow(16, 8, 9) == [9] + [1] * 7  # just half of 2 each
    assert shallow(16, 8, 10) == even(16, 8, 10) == [2] * 8  # it would be less
