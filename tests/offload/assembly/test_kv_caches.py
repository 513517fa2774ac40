"""KV caches that passes go on with, by themselves: which may have been cropped, and which gives its memory back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cache.errors import ContextError
from offload.assembly.caches import Caches


class Cache:
    """As transformers', of `length` tokens."""

    def __init__(self, length: int, croppable: bool = True, users: bool = False) -> None:
        self.length, self.is_croppable, self._is_user_defined = length, croppable, users
        self.layers = ["keys and values"]

    def get_seq_length(self) -> int:
        return self.length


def after_a_pass(cache: Cache, stateful: bool = False) -> Caches:
    """What is known once a pass has left `cache`."""
    caches = Caches(SimpleNamespace(_is_stateful=stateful))
    caches.left(SimpleNamespace(past_key_values=cache), cache.length)
    return caches


@pytest.mark.parametrize(("stateful", "croppable"), [(False, True), (True, True), (False, False), (True, False)])
def test_a_cropped_cache_is_refused_where_anything_cannot_go_back(stateful: bool, croppable: bool) -> None:
    cache = Cache(16, croppable)
    caches = after_a_pass(cache, stateful)
    assert caches.length(cache) == 16
    cache.length = 10
    if stateful or not croppable:
        with pytest.raises(ContextError, match="cropped from 16 tokens to 10"):
            caches.length(cache)
    else:
        assert caches.length(cache) == 10
    cache.length = 0
    assert caches.length(cache) == 0  # it begins anew


def test_what_was_never_seen_has_its_tokens() -> None:
    caches = Caches(SimpleNamespace(_is_stateful=True))
    assert (caches.length(None), caches.length(Cache(7))) == (0, 7)


@pytest.mark.parametrize(
    ("new", "users", "kept"), [(17, False, False), (17, True, True), (16, False, True), (5, False, True)]
)
def test_a_cache_whose_text_is_read_anew_gives_its_memory_back(new: int, users: bool, kept: bool) -> None:
    """With one token more, as Phi-3.5-MoE does it; a cache that the user gave stays his."""
    cache: Any = Cache(16, users=users)
    after_a_pass(cache).read_anew(new)
    assert bool(cache.layers) is kept
