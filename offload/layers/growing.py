"""A KV cache that has room for the tokens to come: a new one is written beside the others, and nothing is copied.

transformers' own cache makes new tensors of all keys and all values for every token and layer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_TOKENS = 64  # room for so many at a time
_ROOM = "_offload_room"


def append(cache: Any, key: torch.Tensor, value: torch.Tensor, layer_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One new token's key and value [1, H, 1, D] -> all keys and values of the layer [1, H, L, D]."""
    grown = grow(cache, layer_index, key.dtype)
    if grown is None:
        found: tuple[torch.Tensor, torch.Tensor] = cache.update(key, value, layer_index)
        return found
    for kept, new in zip(grown, (key, value), strict=True):
        kept[:, :, -1] = new[:, :, 0]
    return grown


def grow(cache: Any, layer_index: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All keys and values of the layer [1, H, L, D], with a place at the end for one token more, to be written to.

    None for caches and layers of other classes, which do what they do, before the first token, and where keys are not
    one row of `dtype`. Side effect: the layer has them, and keeps room for up to 64 tokens more.
    """
    layers = getattr(cache, "layers", ())
    layer: Any = layers[layer_index] if type(cache) is DynamicCache and layer_index < len(layers) else None
    if type(layer) is not DynamicLayer or cache.offloading or not layer.get_seq_length():
        return None
    if layer.keys.dtype is not dtype or len(layer.keys) != 1:
        return None
    length = layer.keys.shape[2]
    rooms = getattr(layer, _ROOM, None)
    if rooms is None or not (_holds(rooms[0], layer.keys) and _holds(rooms[1], layer.values)):
        rooms = _with_room(layer.keys), _with_room(layer.values)
        setattr(layer, _ROOM, rooms)
    keys, values = rooms
    layer.keys, layer.values = grown = keys.narrow(2, 0, length + 1), values.narrow(2, 0, length + 1)
    return grown


def _holds(room: torch.Tensor, kept: torch.Tensor) -> bool:
    """Whether `kept` is the beginning of `room`, with a place behind it that may be written to."""
    return (
        kept.data_ptr() == room.data_ptr()
        and kept.stride() == room.stride()
        and kept.shape[:2] == room.shape[:2]
        and kept.shape[2] < room.shape[2]
        and room.is_inference() <= torch.is_inference_mode_enabled()
    )


def _with_room(kept: torch.Tensor) -> torch.Tensor:
    rows, heads, length, width = kept.shape
    room = kept.new_empty(rows, heads, length + _TOKENS, width)
    room[:, :, :length] = kept
    return room
