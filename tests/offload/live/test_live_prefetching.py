"""Prefetching in a live model: whatever is predicted, the output is the resident model's, and the books are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from by_hand import believes_in_time
from live_model import WILD, always_on, check_books, drive, open_model
from logs import first_difference, twin

from cache.errors import PolicyError, TraceError
from cache.traces.trace import Trace
from cache.types import Tier
from offload.decide.prefetch import Prefetcher
from offload.decide.prefetchers.base import make_rule, rule_names
from offload.layers.lookahead import GateLookahead


@pytest.mark.parametrize("pool", ["global", "layer"])
@pytest.mark.parametrize("slots", [2, 7, 12, 24])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_wrong_predictions_change_nothing_but_time(folder: Path, device: str, slots: int, pool: str) -> None:
    ids = tiny.ids(1, 9)
    arguments = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
    expected = tiny.resident(folder).generate(ids, **arguments)
    with open_model(folder, slots, device=device, pool=pool, predictor=WILD, prefetch_depth=3) as model:
        always_on(model)
        for _ in range(2):
            assert torch.equal(model.generate(ids, **arguments), expected)
        counts = check_books(model)
        assert counts.prefetches > 0 or slots == 2


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("policy", ["recall(bypass=True)", "stubborn_policy:Stubborn"])
@pytest.mark.parametrize("cpu_slots", [6, 30])
def test_policies_that_bypass(folder: Path, policy: str, depth: int, cpu_slots: int) -> None:
    """Members that give their place up, and what late fetches evict, are not fetched ahead in the same event."""
    ids = tiny.ids(1, 9)
    arguments = {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False}
    expected = tiny.resident(folder).generate(ids, **arguments)
    with open_model(folder, 9, device="emulated", policy=policy, predictor=WILD, prefetch_depth=depth) as model:
        always_on(model)
        host = model.parts.runtime.manager.caches[1]
        host.capacities[0] = cpu_slots * model.plan.slot_bytes  # less than there is memory for
        for _ in range(3):
            assert torch.equal(model.generate(ids, **arguments), expected)
        check_books(model)
        model.parts.runtime.settle()
        model.parts.runtime.manager.check_integrity()


def test_another_predictor_starts_from_nothing(folder: Path) -> None:
    ids = tiny.ids(1, 9)
    with open_model(folder, 9, predictor=WILD) as model:
        always_on(model)
        model.generate(ids, max_new_tokens=30, do_sample=False)
        model.use_predictor("none")
        manager = model.parts.runtime.manager
        manager.check_integrity()
        assert manager.prefetcher is not None and not manager.prefetcher.predicts  # prompts are streamed all the same
        assert not any(cache._candidates.favoured for cache in manager.caches)
        model.use_predictor("cross-layer-gate", depth=1)
        model.generate(ids, max_new_tokens=30, do_sample=False)
        assert model.stats.as_dict()["prefetch"] is not None


def test_a_link_so_slow_that_every_prefetch_is_late(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefetches are begun whatever they gain, taken back at random, and arrive after they were needed."""
    ids = tiny.ids(1, 5)
    arguments = {"max_new_tokens": 25, "min_new_tokens": 25, "do_sample": False}
    expected = tiny.resident(folder).generate(ids, **arguments)
    with open_model(folder, 12, device="emulated", link="4MB/s", predictor=WILD, prefetch_depth=2) as model:
        believes_in_time(always_on(model), monkeypatch)
        assert torch.equal(model.generate(ids, **arguments), expected)
        counts = check_books(model)
        assert counts.cancelled_prefetches > 0 and counts.late_hits > 0


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_an_oracle_leaves_few_misses(
    folder: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.safetensors"
    ids = tiny.ids(1, 9)
    arguments = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
    with open_model(folder, 12, device=device, prefill="on-demand") as model, model.record_trace(path):
        expected = model.generate(ids, **arguments)
    on_demand = model_misses(folder, ids, arguments, device)
    with open_model(folder, 12, device=device, prefill="on-demand") as model:
        model.use_predictor("oracle", depth=1, profile=path)
        believes_in_time(always_on(model), monkeypatch)
        assert torch.equal(model.generate(ids, **arguments), expected)
        counts = check_books(model)
    assert counts.wasted_prefetches == 0
    assert counts.misses < on_demand / 2
    assert counts.useful_prefetches > on_demand / 2


def model_misses(folder: Path, ids: torch.Tensor, arguments: dict[str, Any], device: str) -> int:
    with open_model(folder, 12, device=device, prefill="on-demand") as model:
        model.generate(ids, **arguments)
        counts = model.stats.tiers[model.plan.computing_tier].counts
        return counts.misses


@pytest.mark.parametrize("rule", rule_names())
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_no_prefetch_rule_changes_anything_but_time(folder: Path, device: str, rule: str) -> None:
    ids = tiny.ids(1, 9)
    arguments = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    expected = tiny.resident(folder).generate(ids, **arguments)
    with open_model(folder, 12, device=device, predictor="cross-layer-gate", prefetcher=rule) as model:
        always_on(model)
        for _ in range(2):
            assert torch.equal(model.generate(ids, **arguments), expected)
        counts = check_books(model)
        assert counts.prefetches > 0 or rule in ("ours", "pre-gated", "read-me")  # gates are never certain


@pytest.mark.parametrize(
    ("predictor", "rule"), [("frequency", "ours"), *((WILD, rule) for rule in ("ours", "fate", "hybrimoe", "finemoe"))]
)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_live_run_with_prefetching_is_decided_again(folder: Path, device: str, predictor: str, rule: str) -> None:
    with open_model(folder, 9, device=device, predictor=predictor, prefetcher=rule) as model:
        manager = model.parts.runtime.manager
        manager.log = log = []
        drive(model)
        drive(model)
        prefetcher = manager.prefetcher
    assert prefetcher is not None
    assert predictor != WILD or sum(len(decision.prefetches) for decision in log) > 20
    again = twin(manager, model.rules)
    made = type(prefetcher.predictor)(3, 8, prefetcher.predictor.params)
    again.prefetcher = Prefetcher(made, prefetcher.depth, make_rule(rule))
    assert first_difference(log, again) is None


def test_statistics_tell_of_it(folder: Path) -> None:
    with open_model(folder, 9, predictor=WILD) as model:
        model.generate(tiny.ids(1, 9), max_new_tokens=40, do_sample=False)
        stats = model.stats.as_dict()
    assert stats["prefetches"] >= stats["useful_prefetches"] > 0
    assert stats["prefetch"] in ("on", "off")
    with open_model(folder, 9, predictor="none") as model:
        assert model.stats.as_dict()["prefetch"] is None


def test_by_default_the_next_gates_are_asked_where_anything_is_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"max_new_tokens": 40, "do_sample": False}
    expected = tiny.resident(folder).generate(tiny.ids(1, 9), **arguments)
    with open_model(folder, 9) as model:
        assert model.rules.predictor == "cross-layer-gate"
        believes_in_time(always_on(model), monkeypatch)
        assert torch.equal(model.generate(tiny.ids(1, 9), **arguments), expected)
        assert model.stats.as_dict()["useful_prefetches"] > 0
        model.use_predictor("none")
        assert model.rules.predictor == "none"
        model.use_predictor("auto", depth=1)
        assert (model.rules.predictor, model.rules.prefetch_depth) == ("cross-layer-gate", 1)
    with tiny.open_model(folder) as model:
        assert model.plan.slots(Tier.CPU) == 24 and model.rules.predictor == "none"


@pytest.mark.parametrize("found", ["at once", "in the first pass"])
def test_gates_that_cannot_be_asked_are_only_asked_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise TraceError("cannot be asked") if found == "at once" else IndexError("cannot be asked")

    monkeypatch.setattr(GateLookahead, "__init__" if found == "at once" else "_chosen_by", refuse)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    expected = tiny.resident(folder).generate(tiny.ids(1, 9), **arguments)
    with open_model(folder, 9) as model:
        assert torch.equal(model.generate(tiny.ids(1, 9), **arguments), expected)
        assert model.rules.predictor == "none" and model.stats.as_dict()["prefetch"] is None
    with pytest.raises((TraceError, IndexError), match="cannot be asked"):  # noqa: SIM117
        with open_model(folder, 9, predictor="cross-layer-gate") as model:
            model.generate(tiny.ids(1, 9), **arguments)


def test_rules_that_mean_nothing_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="--prefetch-depth 2 does nothing without a --predictor"):
        tiny.open_model(folder, predictor="none", prefetch_depth=2)
    with pytest.raises(PolicyError, match="no predictor is called"):
        tiny.open_model(folder, predictor="fate")
    with pytest.raises(PolicyError, match="learns from a recorded trace"):
        tiny.open_model(folder, predictor="expert-map")
    with pytest.raises(PolicyError, match='predictor "oracle" needs to know the future: it runs in a replay'):
        tiny.open_model(folder, predictor="oracle")
    other = tiny.save(tmp_path / "other", "mixtral", num_hidden_layers=2, num_local_experts=4)
    path = tmp_path / "t.safetensors"
    with tiny.open_model(other) as model, model.record_trace(path):
        model.generate(tiny.ids(1, 3), max_new_tokens=3, do_sample=False)
    assert Trace.open(path).num_layers == 2
    with pytest.raises(Exception, match="name a profile of the same model"):
        tiny.open_model(folder, predictor="transition", profile=path)
    with pytest.raises(PolicyError, match="needs to know the future"):
        tiny.open_model(folder, predictor="oracle", profile=path)


def test_a_predictor_that_is_refused_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.layers import lookahead as gate_lookahead

    ids = tiny.ids(1, 40)
    with open_model(folder, 12, predictor="cross-layer-gate") as model:
        manager, rules = model.parts.runtime.manager, model.rules
        before = manager.prefetcher, manager.prefill
        monkeypatch.setattr(gate_lookahead, "router_beside", lambda *_: (None, None))
        with pytest.raises(TraceError, match="cannot be asked ahead"):
            model.use_predictor("cross-layer-gate", depth=1)
        assert (manager.prefetcher, manager.prefill) == before and model.rules == rules
        always_on(model)
        model.generate(ids, max_new_tokens=4, do_sample=False)
        assert check_books(model).prefetches > 0
