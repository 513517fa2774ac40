"""A KV cache that has room for the tokens to come: a new one is written beside the others, and nothing is copied.

transformers' own cache makes new tensors of all keys and all values for every token and layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_TOKENS = 64  # room for so many at a time
_ROOM = "_offload_room"


class _Room(NamedTuple):
    """Where a layer's keys and values [1, H, L, D] lie, with places behind them.

    `filled` is how many places have been written to, the same for whoever shares them; `end` is where this layer's own
    end. A layer that has other tensors than these, or that somebody went beyond, needs other room.
    """

    all_keys: torch.Tensor
    all_values: torch.Tensor
    filled: list[int]
    keys: torch.Tensor
    values: torch.Tensor
    end: int

    def goes_on(self, layer: Any) -> bool:
        """Whether the layer's next token may be written behind its last one."""
        return (
            layer.keys is self.keys
            and layer.values is self.values
            and self.end == self.filled[0] < self.all_keys.shape[2]
            and self.all_keys.is_inference() <= torch.is_inference_mode_enabled()
        )


def append(cache: Any, key: torch.Tensor, value: torch.Tensor, layer_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One new token's key and value [1, H, 1, D] -> all keys and values of the layer [1, H, L, D]."""
    grown = grow(cache, layer_index, key)
    if grown is None:
        found: tuple[torch.Tensor, torch.Tensor] = cache.update(key, value, layer_index)
        return found
    for kept, new in zip(grown, (key, value), strict=True):
        kept[:, :, -1] = new[:, :, 0]
    return grown


def grow(cache: Any, layer_index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All keys and values of the layer [1, H, L, D], with a place at the end for one token more, to be written to.

    They are `like` [1, H, any, D]. None where `length_with_next` says 0. Side effect: the layer has them, or what its
    window keeps of them, and keeps room for up to 64 tokens more.
    """
    if not length_with_next(cache, layer_index, like.dtype):
        return None
    layer: Any = cache.layers[layer_index]
    if not layer.is_initialized:
        layer.lazy_initialization(like, like)
        layer.keys = layer.values = like[:, :, :0]
    length, window = layer.keys.shape[2], getattr(layer, "sliding_window", 0)
    room: _Room | None = getattr(layer, _ROOM, None)
    if room is not None and room.goes_on(layer):
        keys, values, filled, end = room.all_keys, room.all_values, room.filled, room.end
    else:
        keys, values, filled, end = _with_room(layer.keys), _with_room(layer.values), [length], length
    grown = keys.narrow(2, end - length, length + 1), values.narrow(2, end - length, length + 1)
    filled[0] = end + 1
    gone = max(length + 2 - window, 0) if window else 0
    layer.keys, layer.values = (grown[0][:, :, gone:], grown[1][:, :, gone:]) if gone else grown
    setattr(layer, _ROOM, _Room(keys, values, filled, layer.keys, layer.values, end + 1))
    if window:
        layer.cumulative_length += 1
    return grown


def length_with_next(cache: Any, layer_index: int, dtype: torch.dtype) -> int:
    """How many keys of one row of `dtype` the layer's next token sees, its own among them.

    0 for caches and layers of other classes, which do what they do, and for layers that have been emptied.
    """
    layers = getattr(cache, "layers", ())
    layer: Any = layers[layer_index] if type(cache) is DynamicCache and layer_index < len(layers) else None
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or cache.offloading:
        return 0
    if getattr(layer, "record_past", False):
        return 0
    if not layer.is_initialized:
        return 1
    if not layer.get_seq_length() or layer.keys.dtype is not dtype or len(layer.keys) != 1:
        return 0
    return int(layer.keys.shape[2]) + 1


def _with_room(kept: torch.Tensor) -> torch.Tensor:
    rows, heads, length, width = kept.shape
    room = kept.new_empty(rows, heads, length + _TOKENS, width)
    room[:, :, :length] = kept
    return room
