from __future__ import annotations

from cache.stats import TierStats


def test_every_access_is_a_hit_a_late_hit_or_a_miss() -> None:
    stats = TierStats(hits=6, late_hits=1, misses=3, bypasses=2, evictions=1, bytes_in=400)
    assert stats.accesses == 10
    assert stats.hit_rate == 0.6


def test_late_hits_are_no_hits() -> None:
    assert TierStats(late_hits=5).hit_rate == 0.0


def test_no_access_is_no_hit_rate_to_divide_by() -> None:
    assert TierStats().hit_rate == 0.0
