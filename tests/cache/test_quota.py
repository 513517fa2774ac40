"""What every quota keeps to, and how one is found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import random_trace, zipf_markov

from cache.errors import PolicyError, TraceError
from cache.quota import Quota, even, find_quota, make_quota, names, proportional
from cache.traces.passes import routing_events


class Greedy(Quota):
    """A user's own: everything to the first layers."""

    def divide(self, total: int) -> list[int]:
        whole, rest = divmod(total, self.num_experts)
        return [self.num_experts if layer < whole else rest * (layer == whole) for layer in range(self.num_layers)]


class Miser(Quota):
    """A user's own that keeps something for itself."""

    def divide(self, total: int) -> list[int]:
        return [0] * self.num_layers


ALL = [*names(), f"{__name__}:Greedy"]


def test_the_built_in_ones() -> None:
    assert names() == ("distinct", "dp", "even", "plec", "shallow")
    assert all(find_quota(name).__doc__ for name in names())
    assert [name for name in names() if find_quota(name).adapts] == ["distinct", "dp", "plec"]
    assert [name for name in names() if find_quota(name).can_learn] == ["distinct", "dp", "plec"]


def check(quota: Quota, total: int) -> list[int]:
    """The contract, whatever was seen before."""
    slots = quota.slots(total)
    layers, experts = quota.num_layers, quota.num_experts
    assert len(slots) == layers
    assert sum(slots) == min(total, layers * experts)
    assert all(type(n) is int and 0 <= n <= experts for n in slots)
    assert quota.slots(total) == slots, "to ask is no side effect"
    return slots


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 10**6), total=st.integers(0, 30), learns=st.booleans(), seen=st.integers(0, 40))
def test_every_rule_hands_out_the_whole_capacity(name: str, seed: int, total: int, learns: bool, seen: int) -> None:
    profile = random_trace(seed)
    quota = make_quota(name, profile.num_layers, profile.num_experts, profile if learns else None)
    at_first = check(quota, total)
    if not learns and name not in ("shallow", ALL[-1]):
        assert at_first == even(total, profile.num_layers, profile.num_experts)
    for _, event in zip(range(seen), routing_events(profile), strict=False):
        quota.observe(event)
        check(quota, total)
    quota.reset()
    assert check(quota, total) == at_first, "what was learnt stays, and what was observed is forgotten"


@pytest.mark.parametrize("name", ALL)
def test_what_does_not_adapt_never_changes(name: str) -> None:
    trace = zipf_markov()
    for profile in (None, trace):
        quota = make_quota(name, trace.num_layers, trace.num_experts, profile)
        before = quota.slots(40)
        for event in routing_events(zipf_markov(21)):
            quota.observe(event)
        assert quota.adapts or quota.slots(40) == before
        assert quota.adapts == ((name in ("dp", "distinct") and profile is None) or name == "plec")


def test_even_gives_the_rest_to_the_first_layers() -> None:
    assert even(10, 4, 8) == make_quota("even", 4, 8).slots(10) == [3, 3, 2, 2]


def test_what_a_layer_cannot_hold_goes_to_the_others() -> None:
    assert proportional(10, [8, 1, 1], 4) == [4, 3, 3]
    assert proportional(10, [1, 1, 1], 4) == [4, 3, 3]
    assert proportional(99, [1, 2, 3], 4) == [4, 4, 4]


def test_one_that_is_no_division_is_refused() -> None:
    quota = make_quota(f"{__name__}:Miser", 2, 4)
    with pytest.raises(PolicyError, match=r'quota "Miser" divided 5 places among 2 layers of 4 experts as \[0, 0\]'):
        quota.slots(5)
    assert quota.slots(8) == [4, 4], "where all fit there is nothing to ask"


def test_what_cannot_be_found_or_made() -> None:
    with pytest.raises(PolicyError, match='no quota is called "fair": choose one of distinct, dp, even, plec, shallow'):
        make_quota("fair", 2, 4)
    with pytest.raises(PolicyError, match="rate lies between 0 and 1, not 2"):
        make_quota("plec(rate=2)", 2, 4)
    with pytest.raises(TraceError, match="4 layers of 32 experts, not 2 of 4"):
        make_quota("distinct", 2, 4, zipf_markov())
    assert isinstance(make_quota("even", 2, 4, zipf_markov()), Quota), "which makes no use of it"
