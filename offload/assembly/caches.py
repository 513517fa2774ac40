"""The KV caches that passes go on with: how much is in them, and whether they can be where they are said to be."""

from __future__ import annotations

import weakref
from typing import Any

from cache.errors import ContextError
from offload.layers.across_passes import counted


class Caches:
    """What the passes of `module` left in KV caches.

    A cache that was cropped to fewer tokens has forgotten them in attention's keys and values. States that every token
    has changed cannot go back: what would be read on from there is wrong.
    """

    def __init__(self, module: Any) -> None:
        self._stateful = bool(getattr(module, "_is_stateful", False))
        self._lengths: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[Any] | None = None

    def length(self, cache: Any) -> int:
        """Tokens in it; None has none. Raises ContextError if it was cropped and cannot be."""
        if cache is None:
            return 0
        counted(cache)
        length, before = int(cache.get_seq_length()), self._lengths.get(cache, 0)
        if 0 < length < before and (self._stateful or not cache.is_croppable):
            raise ContextError(
                f"the KV cache was cropped from {before} tokens to {length}, and this model's layers have states that "
                "cannot go back: begin with a new cache, or keep a copy of one (copy.deepcopy) to go back to"
            )
        return length

    def left(self, output: Any, length: int) -> None:
        """A pass gave `output`, whose cache has `length` tokens."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            counted(cache)
            self._lengths[cache] = length
            self._last = weakref.ref(cache)

    def read_anew(self, new: int) -> None:
        """A pass of `new` tokens begins without a cache.

        If it reads again what the last cache has, and one token more, that cache gives its memory back: Phi-3.5-MoE
        does so when a text outgrows its short positions, and there is room for one cache, not for two.
        """
        last = None if self._last is None else self._last()
        if last is None or getattr(last, "_is_user_defined", False) or not last.layers:
            return
        if self._lengths.get(last) == new - 1:
            last.layers.clear()
