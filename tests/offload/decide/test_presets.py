"""Presets: their parts exist and fit together, and what a user says wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.errors import PolicyError
from cache.lanes import Lanes
from cache.policy import find_policy, make_policy
from cache.quota import make_quota
from offload.costs.precision import parse_precisions
from offload.decide.fallbacks.base import make_fallback
from offload.decide.placements.base import EMPTY, make_placement
from offload.decide.prefetchers.base import OURS, make_rule
from offload.decide.preset import DEFAULT, PARTS, Preset
from offload.decide.presets import PRESETS, compose, find_preset
from offload.decide.schedulers.base import make_scheduler
from offload.options import LoadOptions
from predictors.base import build_predictor, find_predictor

NAMES = (
    *("fate", "hybrimoe", "hobbit", "edgemoe", "moe-infinity", "finemoe", "adapmoe", "mixtral-offloading"),
    *("expertflow", "d2moe", "fiddler", "freetoken", "expert-buffering", "monde", "se-moe", "dali"),
)


def test_the_table_has_every_system() -> None:
    assert tuple(PRESETS) == NAMES
    assert all(preset.source for preset in PRESETS.values())


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_parts_exist_and_fit_together(preset: Preset) -> None:
    names = parse_precisions(preset.experts)
    assert make_fallback(preset.fallback, 4, 8, len(names)).needs_lower == (len(names) > 1)
    build_predictor(preset.predictor, 4, 8)
    make_scheduler(preset.scheduler)
    assert preset.quota is None or (preset.pool == "layer" and make_quota(preset.quota, 4, 8).slots(9))
    if not find_policy(preset.policy).learns:
        assert make_policy(preset.policy, Lanes.shared(4, 8, 6)).causal
    make_rule(preset.prefetcher)
    make_placement(preset.placement, 4, 8)
    assert preset.predictor != "none" or (preset.prefetcher, preset.prefetch_depth) == (OURS, None)
    assert preset.scheduler == "gpu-only" or preset.lossless
    assert find_predictor(preset.predictor).causal
    assert compose(LoadOptions(preset=preset.name)) == preset


def test_what_a_user_says_wins() -> None:
    assert compose(LoadOptions()) == DEFAULT
    assert compose(LoadOptions(policy="lfu")).policy == "lfu"
    assert compose(LoadOptions(preset="hybrimoe", policy="lru", pool="global")).parts == {
        **PRESETS["hybrimoe"].parts,
        "policy": "lru",
        "pool": "global",
    }
    without = compose(LoadOptions(preset="fate", predictor="none"))
    assert (without.prefetcher, without.prefetch_depth) == (OURS, None)
    assert compose(LoadOptions(preset="fate", prefetcher="read-me")).prefetcher == "read-me"
    assert compose(LoadOptions(preset="fate", pool="global")).quota is None
    assert compose(LoadOptions(quota="dp")).pool == compose(LoadOptions(preset="hobbit", quota="dp")).pool == "layer"
    with pytest.raises(PolicyError, match=r"--quota dp divides .* with --pool global"):
        compose(LoadOptions(quota="dp", pool="global"))
    assert compose(LoadOptions(preset="fate", prefetch_depth=3)).prefetch_depth == 3
    with pytest.raises(PolicyError, match="choose one of fate, hybrimoe, "):
        find_preset("fat")


@pytest.mark.parametrize(
    ("preset", "said", "experts", "fallback", "scheduler"),
    [
        ("hobbit", {"experts": "nf4"}, "nf4", "none", "gpu-only"),
        ("hobbit", {"experts": "int8>int4"}, "int8>int4", "hobbit(skip=True)", "gpu-only"),
        ("hobbit", {"fallback": "none"}, "auto", "none", "gpu-only"),
        ("hobbit", {"fallback": "deadline"}, "auto,nf4", "deadline", "gpu-only"),
        ("hybrimoe", {"experts": "nf4"}, "nf4", "none", "hybrimoe"),
        ("hybrimoe", {"experts": "auto,nf4", "fallback": "hobbit"}, "auto,nf4", "hobbit", "hybrimoe"),
        ("adapmoe", {"experts": "nf4"}, "nf4", "adapmoe(skip=True)", "gpu-only"),
        ("adapmoe", {"experts": "auto,nf4"}, "auto,nf4", "none", "gpu-only"),
        ("edgemoe", {"experts": "int8,int4"}, "int8,int4", "edgemoe", "gpu-only"),
        ("d2moe", {"experts": "int8>int4>int2"}, "int8>int4>int2", "d2moe", "gpu-only"),
        ("fate", {"experts": "int4,int2", "fallback": "fate"}, "int4,int2", "fate", "gpu-only"),
        (None, {"experts": "auto,nf4"}, "auto,nf4", "none", "gpu-only"),
    ],
)
def test_parts_that_belong_together_give_way_together(
    preset: str | None, said: dict[str, str], experts: str, fallback: str, scheduler: str
) -> None:
    found = compose(LoadOptions(preset=preset, **said))
    assert (found.experts, found.fallback, found.scheduler) == (experts, fallback, scheduler)


def test_auto_is_what_was_tuned(tmp_path: Path) -> None:
    asked: list[str] = []

    def stored() -> Preset | None:
        asked.append("auto")
        return PRESETS["fate"] if len(asked) > 1 else None

    assert compose(LoadOptions(preset="auto"), stored) == DEFAULT
    assert compose(LoadOptions(preset="auto", policy="lru"), stored).parts == {**PRESETS["fate"].parts, "policy": "lru"}
    assert compose(LoadOptions(preset="fate"), stored) == PRESETS["fate"] and len(asked) == 2


def test_every_part_is_a_flag() -> None:
    options = LoadOptions()
    assert all(getattr(options, name, None) is None for name in PARTS)


def test_the_documentation_has_the_table() -> None:
    """A line for each preset with what it is made of, and one with where it comes from."""
    text = (Path(__file__).parents[3] / "docs" / "presets.md").read_text()
    for preset in PRESETS.values():
        parts = [part for part in preset.parts.values() if part not in (None, "none", OURS, "gpu-only", EMPTY)]
        row = next(line for line in text.splitlines() if line.startswith(f"| `{preset.name}` | `{preset.policy}` |"))
        assert all(str(part) in row for part in parts)
        assert f"| `{preset.name}` | {preset.source} | {preset.differs} |" in text
