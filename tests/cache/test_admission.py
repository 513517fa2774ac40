"""Admission for an event: whoever may not go keeps its place, and only the rest is shared out."""

from __future__ import annotations

import pytest
from small_cache import A, B, C, D, fill, make_cache

from cache.residency import Admission, State


@pytest.mark.parametrize("kept", ["pinned", "pending"])
def test_a_member_that_may_not_go_keeps_its_place(kept: str) -> None:
    cache = make_cache(20)
    cache.reserve(A, 10)
    if kept == "pinned":
        cache.commit(A)
        cache.pin(A)
    fill(cache, B)
    state = cache.state(A)
    # A is the weakest of all, and still only B's place is to be had.
    assert cache.admit([A, C, D], 10) == Admission(admitted=[D], evicted=[B], surrendered=[])
    assert cache.state(A) is state
    cache.check_integrity()


def test_a_cache_of_pinned_experts_admits_nobody() -> None:
    cache = make_cache(20)
    fill(cache, A, B)
    for key in (A, B):
        cache.pin(key)
    assert cache.admit([A, B, C], 10) == Admission([], [], [])
    assert {cache.state(key) for key in (A, B)} == {State.RESIDENT} and cache.state(C) is State.MISS
