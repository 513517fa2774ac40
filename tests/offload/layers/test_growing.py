"""A KV cache with room for tokens to come: the same keys and values, whatever is done to the cache meanwhile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen3MoeConfig

from offload.layers import growing
from offload.layers.growing import append


def token(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.randn(2, 1, 3, 1, 8, generator=torch.Generator().manual_seed(seed))
    return made[0], made[1]


def prompt(tokens: int = 5) -> DynamicCache:
    cache = DynamicCache()
    keys, values = torch.randn(2, 1, 3, tokens, 8, generator=torch.Generator().manual_seed(tokens))
    cache.update(keys, values, 0)
    return cache


def same(a: Any, b: Any) -> bool:
    return bool(torch.equal(a.layers[0].keys, b.layers[0].keys) and torch.equal(a.layers[0].values, b.layers[0].values))


def both(ours: DynamicCache, theirs: DynamicCache, seeds: range) -> None:
    for seed in seeds:
        found, expected = append(ours, *token(seed), 0), theirs.update(*token(seed), 0)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert same(ours, theirs) and ours.get_seq_length() == theirs.get_seq_length()


def test_tokens_are_appended_and_rarely_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    with_room = growing._with_room
    monkeypatch.setattr(growing, "_with_room", lambda kept: made.append(kept.shape[2]) or with_room(kept))
    both(prompt(), prompt(), range(150))
    assert made == [5, 5, 69, 69, 133, 133]


def test_the_first_token_may_be_appended() -> None:
    config = Qwen3MoeConfig(num_hidden_layers=1)
    ours, theirs = DynamicCache(config=config), DynamicCache(config=config)
    both(ours, theirs, range(3))
    for cache in (ours, theirs):
        keys, values = torch.randn(2, 1, 3, 5, 8, generator=torch.Generator().manual_seed(5))
        cache.update(keys, values, 0)
    both(ours, theirs, range(10, 12))


def test_a_cropped_cache_goes_on() -> None:
    ours, theirs = prompt(), prompt()
    both(ours, theirs, range(10))
    for cache in (ours, theirs):
        cache.crop(-4)
    both(ours, theirs, range(100, 180))


def test_copies_go_their_own_way() -> None:
    ours, theirs = prompt(), prompt()
    both(ours, theirs, range(3))
    branch, their_branch = copy.deepcopy(ours), copy.deepcopy(theirs)
    both(ours, theirs, range(10, 20))
    both(branch, their_branch, range(30, 40))
    both(ours, theirs, range(50, 130))
    assert not same(ours, branch)


def test_a_cache_made_of_anothers_tensors_goes_its_own_way() -> None:
    ours, theirs = prompt(), prompt()
    both(ours, theirs, range(3))
    other, their_other = DynamicCache(), DynamicCache()
    other.update(ours.layers[0].keys, ours.layers[0].values, 0)
    their_other.update(theirs.layers[0].keys, theirs.layers[0].values, 0)
    both(ours, theirs, range(10, 20))
    both(other, their_other, range(30, 40))


def test_reordered_and_reset_caches_go_on() -> None:
    ours, theirs = prompt(), prompt()
    both(ours, theirs, range(3))
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([0]))
    both(ours, theirs, range(10, 15))
    for cache in (ours, theirs):
        cache.reset()
    both(ours, theirs, range(20, 25))


def test_inference_mode_may_begin_and_end() -> None:
    ours, theirs = prompt(), prompt()
    with torch.inference_mode():
        both(ours, theirs, range(3))
    with torch.no_grad():
        both(ours, theirs, range(10, 13))
    with torch.inference_mode():
        both(ours, theirs, range(20, 23))


def windowed(window: int) -> DynamicCache:
    sizes = {"num_hidden_layers": 1, "sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
    cache = DynamicCache(config=Qwen3MoeConfig(**sizes))
    assert type(cache.layers[0]).__name__ == "DynamicSlidingWindowLayer"
    return cache


@pytest.mark.parametrize("window", [0, 6])
def test_what_somebody_else_has_is_not_written_to(window: int) -> None:
    """A copied layer has the same tensors; and whoever kept some before the cache was cropped still has them."""
    ours, theirs = (windowed(window) if window else prompt() for _ in range(2))
    both(ours, theirs, range(3))
    branch, their_branch = copy.copy(ours), copy.copy(theirs)
    for cache in (branch, their_branch):
        cache.layers = [copy.copy(cache.layers[0])]
    both(ours, theirs, range(10, 12))
    both(branch, their_branch, range(30, 32))
    both(ours, theirs, range(12, 14))
    saved = ours.layers[0].keys
    before = saved.clone()
    if not window:
        for cache in (ours, theirs):
            cache.crop(-1)
    both(ours, theirs, range(40, 42))
    assert torch.equal(saved, before)


@pytest.mark.parametrize("window", [2, 4, 70])
@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_a_window_slides(window: int, tokens: int) -> None:
    """Also beyond the room, and after another prompt."""
    ours, theirs = windowed(window), windowed(window)
    for seeds in (range(200), range(300, 370)):
        for cache in (ours, theirs):
            keys, values = torch.randn(2, 1, 3, tokens, 8, generator=torch.Generator().manual_seed(tokens))
            cache.update(keys, values, 0)
        both(ours, theirs, seeds)


def test_windows_are_rarely_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    with_room = growing._with_room
    monkeypatch.setattr(growing, "_with_room", lambda kept: made.append(kept.shape[2]) or with_room(kept))
    ours, theirs = windowed(9), windowed(9)
    both(ours, theirs, range(150))
    assert made == [0, 0, 8, 8, 8, 8]


def test_a_copied_window_goes_its_own_way() -> None:
    ours, theirs = windowed(6), windowed(6)
    both(ours, theirs, range(9))
    branch, their_branch = copy.deepcopy(ours), copy.deepcopy(theirs)
    both(ours, theirs, range(10, 20))
    both(branch, their_branch, range(30, 40))
    assert not same(ours, branch)


def test_a_window_that_remembers_does_what_it_does() -> None:
    ours, theirs = windowed(4), windowed(4)
    for cache in (ours, theirs):
        cache.layers[0].activate_past_recording()
    both(ours, theirs, range(9))
    for cache in (ours, theirs):
        cache.crop(-2)
    both(ours, theirs, range(20, 29))
