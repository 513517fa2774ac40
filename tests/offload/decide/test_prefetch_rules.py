"""What each prefetch rule chooses: by hand, where the paper's rule and this project's own part ways.

A layer's experts take a second each, as does a fetch, and the part of a layer beside them two, unless a test says
otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import by_hand
import pytest

from cache.errors import PolicyError
from cache.lanes import Lanes
from cache.policy import make_policy
from cache.residency import ExpertCache, State
from cache.types import ExpertKey, Phase, Tier
from offload.decide.manager import Manager
from offload.decide.pace import Pace
from offload.decide.plan import Fetch, LayerPlan
from offload.decide.prefetch import Prefetcher
from offload.decide.prefetchers.base import find_rule, make_rule, rule_names
from offload.decide.rules import Rules, depth_of
from offload.decide.stacks import Stacks
from predictors.base import Prediction, Predictor, make_predictor

K, P = ExpertKey, Prediction
LAYERS, EXPERTS = 6, 16


class Told(Predictor):
    """Says `said`."""

    name = "told-rules"
    said: Sequence[Prediction] = ()

    def observe(self, event: object) -> None:
        pass

    def predict(self, depth: int) -> list[Prediction]:
        return [prediction for prediction in self.said if prediction.lead_layers <= depth]


class Rig:
    """Caches of so many places for each slice, and a prefetcher of `rule`. Nothing that is fetched ahead lands."""

    def __init__(self, rule: str, *slots: int, pool: str = "global", dense_s: float = 2.0) -> None:
        stacks = []
        for count in slots or (40,):
            lanes = Lanes.shared(LAYERS, EXPERTS, count)
            if pool == "layer":
                lanes = Lanes.per_layer(LAYERS, EXPERTS, [count] * LAYERS)
            stacks.append([ExpertCache(Tier.CPU, lanes.slots.tolist(), make_policy("lru", lanes))])
        made = make_rule(rule)
        self.told = Told(LAYERS, EXPERTS)
        self.prefetcher = Prefetcher(self.told, depth_of(made, None, LAYERS), made, adaptive=False)
        pace = Pace({Phase.DECODE: 1.0}, {Phase.DECODE: dense_s}, dict.fromkeys(Tier, 1.0))
        self.prefetcher.pace = pace
        precisions = [(i,) for i in range(len(stacks))]
        self.manager = Manager(Stacks(stacks, [1] * len(stacks), precisions), prefetcher=self.prefetcher)

    def hold(self, *keys: ExpertKey) -> None:
        """These are resident, and nobody uses them."""
        for key in keys:
            cache = self.manager.caches[0]
            cache.reserve(key, 1)
            cache.commit(key)

    def event(self, layer: int, experts: Sequence[int], *said: Prediction, **more: Sequence[float]) -> LayerPlan:
        """One event, after which `said` is expected."""
        self.told.said = said
        plan = self.manager.step(by_hand.event(layer, experts, **more))  # type: ignore[arg-type]
        assert plan.error is None
        for fetch in plan.fetches:
            self.manager.arrived(fetch, 0)
        self.manager.finish()
        return plan


def keys(fetches: Sequence[Fetch]) -> list[ExpertKey]:
    return [fetch.key for fetch in fetches]


def expected(layer: int, lead: int, *probabilities: float) -> list[Prediction]:
    """Experts 0, 1, ... of a layer, so probable."""
    return [P(K(layer, expert), probability, lead) for expert, probability in enumerate(probabilities)]


# Every rule


@pytest.mark.parametrize("name", rule_names())
@pytest.mark.parametrize("pool", ["global", "layer"])
def test_whatever_a_rule_chooses_caches_stay_sound(name: str, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the event holds is fetched, nothing is fetched twice, and what goes was evictable."""
    rng = random.Random(0)
    rule = make_rule(name)
    lanes = Lanes.shared(3, 8, 12) if pool == "global" else Lanes.per_layer(3, 8, [5, 4, 3])
    predictor = make_predictor("wild_predictor:Wild", 3, 8)
    prefetcher = Prefetcher(predictor, depth_of(rule, None, 3), rule, adaptive=False)
    cache = ExpertCache(Tier.CPU, lanes.slots.tolist(), make_policy("lru", lanes))
    manager = Manager(Stacks.single([cache], 1), prefetcher=prefetcher)
    by_hand.believes_in_time(prefetcher, monkeypatch)
    flying: list[Fetch] = []
    for step in range(150):
        plan = manager.step(by_hand.event(step % 3, rng.sample(range(8), 2), step // 3))
        assert plan.error is None and not set(keys(plan.prefetches)) & set(plan.keys)
        assert len(set(keys(plan.prefetches))) == len(plan.prefetches)
        for fetch in [f for f in flying if f.key in plan.awaited or rng.random() < 0.3]:
            flying.remove(fetch)
            manager.arrived(fetch, 0)
        for fetch in (*plan.fetches, *plan.late_fetches):
            manager.arrived(fetch, 0)
        flying += plan.prefetches
        manager.finish()
        cache.check_integrity()
    for fetch in flying:
        manager.arrived(fetch, 0)
    manager.check_integrity()


@pytest.mark.parametrize("name", rule_names())
def test_a_rule_without_expectations_fetches_nothing(name: str) -> None:
    assert Rig(name).event(0, [0, 1]).prefetches == []


@pytest.mark.parametrize("name", rule_names())
def test_a_rule_gives_the_same_after_a_reset(name: str) -> None:
    rig = Rig(name)
    said = [*expected(1, 1, 1.0, 1.0, 0.4), *expected(2, 2, 1.0, 1.0)]
    first = keys(rig.event(0, [0, 1], *said).prefetches)
    for fetch in [flight.fetch for flight in rig.prefetcher.flights.values()]:
        rig.manager.arrived(fetch, 0)
    rig.manager.clear()
    assert keys(rig.event(0, [0, 1], *said).prefetches) == first


def test_a_rule_says_how_far_it_looks() -> None:
    found = {name: depth_of(make_rule(name), None, 24) for name in rule_names()}
    assert found == {
        **{"ours": 2, "speculative": 1, "fate": 1, "hobbit": 3, "moe-infinity": 24, "finemoe": 3, "hybrimoe": 3},
        **{"pre-gated": 1, "read-me": 24, "ring": 2},
    }
    assert depth_of(make_rule("fate"), 2, 24) == 2 and depth_of(make_rule("moe-infinity"), None, 3) == 3


@pytest.mark.parametrize("wrong", ["speculative(n=0)", "fate(near=0)", "hobbit(high=.9, low=.2)", "read-me(least=2)"])
def test_parameters_that_mean_nothing_are_refused(wrong: str) -> None:
    with pytest.raises(PolicyError, match="cannot take these parameters"):
        make_rule(wrong)


def test_a_rule_without_a_predictor_is_refused() -> None:
    with pytest.raises(PolicyError, match="--prefetcher fate does nothing without a --predictor"):
        Rules(prefetcher="fate")
    with pytest.raises(PolicyError, match='no prefetcher is called "fat": choose one of fate, '):
        Rules(predictor="frequency", prefetcher="fat")
    assert find_rule("fate").name == "fate"


# Each rule by itself


def test_ours_leaves_what_does_not_gain() -> None:
    """A fetch of 3 s would hide. At .9 that gains 1.8, and at .1 it gains .2, less than what a place may cost."""
    rig = Rig("ours", 4, dense_s=20.0)
    rig.prefetcher.pace.fetch_s = dict.fromkeys(Tier, 3.0)
    rig.event(0, [2, 3])
    assert keys(rig.event(0, [0, 1], *expected(1, 1, 0.9, 0.1)).prefetches) == [K(1, 0)]


def test_speculative_fetches_the_likeliest_few_whatever_that_costs() -> None:
    rig = Rig("speculative(n=2)", 4, dense_s=0.0)
    rig.event(0, [2, 3])
    assert keys(rig.event(0, [0, 1], *expected(1, 1, 0.2, 0.1, 0.1)).prefetches) == [K(1, 0), K(1, 1)]
    held = Rig("speculative(n=2)")
    held.hold(K(1, 0))
    assert keys(held.event(0, [0, 1], *expected(1, 1, 0.9, 0.8, 0.7)).prefetches) == [K(1, 1)]


def test_speculative_gives_up_no_more_places_to_wrong_guesses() -> None:
    """Two wrong guesses hold two places; the next two take these, and not those of experts that were used."""
    rig = Rig("speculative(n=2)", 6)
    for experts in ([2, 3], [0, 1]):
        rig.event(0, experts)
    for guess in (4, 6, 8, 10):
        said = [P(K(1, guess), 0.9, 1), P(K(1, guess + 1), 0.9, 1)]
        for fetch in rig.event(0, [0, 1], *said).prefetches:
            rig.manager.arrived(fetch, 0)
    held = set(rig.manager.caches[0].resident())
    assert held == {*(K(0, expert) for expert in range(4)), K(1, 10), K(1, 11)}


@pytest.mark.parametrize(("dense_s", "count"), [(0.5, 2), (2.5, 4), (9.0, 5)])
def test_fate_widens_by_as_many_as_there_is_time_for(dense_s: float, count: int) -> None:
    """Two are the router's number, and fetched at any time. Computing two residents takes 2 s, and a fetch 1."""
    rig = Rig("fate", dense_s=dense_s)
    rig.hold(K(0, 0), K(0, 1))
    plan = rig.event(0, [0, 1], *expected(1, 1, 0.9, 0.8, 0.5, 0.4, 0.3, 0.1))
    assert keys(plan.prefetches) == [K(1, expert) for expert in range(count)]  # .1 is not near .8


def test_hobbit_stops_at_the_first_layer_that_misses_something() -> None:
    rig = Rig("hobbit")
    rig.hold(K(1, 0), K(1, 1), K(2, 0))
    said = [*expected(1, 1, 0.9, 0.9), *expected(2, 2, 0.9, 0.9), *expected(3, 3, 0.9, 0.9)]
    assert keys(rig.event(0, [0, 1], *said).prefetches) == [K(2, 1)]


def test_hobbit_fetches_lesser_choices_at_less() -> None:
    """Of four, the first two have .4 and .3, so that .7 of the weight is before the third, and .95 before the last."""
    said = expected(1, 1, 0.9, 0.9, 0.9, 0.9)
    for rule, wanted in (("hobbit", [(0, 0), (1, 0), (2, 1)]), ("hobbit(mixed=False)", [(i, 0) for i in range(4)])):
        rig = Rig(rule, 20, 20)
        plan = rig.event(0, [0, 1, 2, 3], *said, weights=(0.05, 0.25, 0.3, 0.4))
        assert [(fetch.key.expert, fetch.slice) for fetch in plan.prefetches] == wanted


def test_moe_infinity_goes_by_probability_and_distance_to_the_last_layer() -> None:
    """.9 four layers off is .3 of six; .5 next is .42. What the next pass needs is not fetched."""
    rig = Rig("moe-infinity", dense_s=9.0)
    said = [P(K(1, 0), 0.5, 1), P(K(3, 1), 0.9, 3), P(K(4, 2), 0.9, 4), P(K(0, 9), 0.9, 6)]
    assert keys(rig.event(0, [0, 1], *said).prefetches) == [K(3, 1), K(1, 0), K(4, 2)]
    short = Rig("moe-infinity", dense_s=0.0)  # the channel is busy with what the event misses, then with one more
    assert keys(short.event(0, [0, 1], *said).prefetches) == [K(3, 1)]


def test_moe_infinity_keeps_what_was_prefetched_and_not_used() -> None:
    rig = Rig("moe-infinity", 3, dense_s=9.0)
    (fetch,) = rig.event(0, [0, 1], P(K(1, 5), 0.9, 1)).prefetches
    rig.manager.arrived(fetch, 0)
    assert rig.event(0, [0, 1], P(K(2, 6), 0.9, 2)).prefetches == []


@pytest.mark.parametrize(("similarity", "count"), [(1.0, 2), (0.3, 2), (0.15, 3), (0.0, 6)])
def test_finemoe_takes_more_the_less_its_map_is_like_the_present(similarity: float, count: int) -> None:
    rig = Rig("finemoe", dense_s=9.0)
    rig.told.similarity = similarity
    assert len(rig.event(0, [0, 1], *expected(1, 1, 0.5, 0.3, 0.1, 0.04, 0.03, 0.03)).prefetches) == count


def test_finemoe_goes_by_probability_over_distance() -> None:
    rig = Rig("finemoe", dense_s=9.0)
    said = [*expected(1, 1, 0.5, 0.2), *expected(2, 2, 0.9, 0.3)]
    assert keys(rig.event(0, [0, 1], *said).prefetches) == [K(1, 0), K(2, 0), K(1, 1), K(2, 1)]


def test_hybrimoe_fetches_where_the_layer_gains_most() -> None:
    """Layer 1 misses one of two and hides its fetch half; layer 2 misses both, and gains a whole fetch by the first."""
    rig = Rig("hybrimoe", dense_s=9.0)
    rig.prefetcher.pace.fetch_s = dict.fromkeys(Tier, 4.0)
    rig.hold(K(1, 0), K(0, 0), K(0, 1))
    said = [*expected(1, 1, 0.9, 0.9), *expected(2, 2, 0.9, 0.9)]
    assert keys(rig.event(0, [0, 1], *said).prefetches)[0] == K(2, 0)
    assert keys(Rig("ours", dense_s=9.0).event(0, [0, 1], *said).prefetches)[0] == K(1, 0)


def test_hybrimoe_stops_when_the_link_is_busy_until_the_next_layer() -> None:
    rig = Rig("hybrimoe", dense_s=0.5)
    rig.hold(K(0, 0), K(0, 1))
    rig.prefetcher.pace.fetch_s = dict.fromkeys(Tier, 2.0)
    assert len(rig.event(0, [0, 1], *expected(1, 1, 0.9, 0.9), *expected(2, 2, 0.9, 0.9)).prefetches) == 2


def test_pre_gated_takes_the_next_layer_whole_and_read_me_the_pass() -> None:
    said = [*expected(1, 1, 1.0, 1.0, 0.9), *expected(2, 2, 1.0), *expected(0, 6, 1.0)]
    assert keys(Rig("pre-gated", dense_s=0.0).event(0, [8, 9], *said).prefetches) == [K(1, 0), K(1, 1)]
    rig = Rig("read-me", dense_s=0.0)
    assert keys(rig.event(0, [8, 9], *said).prefetches) == [K(1, 0), K(1, 1), K(2, 0)]
    full = Rig("read-me", 4, dense_s=0.0)
    plan = full.event(0, [8, 9], *said)
    assert keys(plan.prefetches) == [K(1, 0), K(1, 1)]  # nothing goes that the pass still needs
    assert full.manager.caches[0].state(K(2, 0)) is State.MISS
