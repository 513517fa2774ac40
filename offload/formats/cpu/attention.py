"""Attention of one new token a row, by our own kernel: bfloat16, where torch's takes each query by itself."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from offload.formats.cpu import native
from offload.formats.cpu import threads as own_threads

_PART, _QUERIES = 256, 8  # keys and queries that the kernel takes together
_WIDTHS = range(32, 257, 32)
_JOB = struct.Struct("=20qd")


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the kernel takes them: see `one_token`."""
    tensors = query, key, value
    return (
        bool(native.level())
        and all(each.dtype == torch.bfloat16 and each.device.type == "cpu" for each in tensors)
        and all(each.stride(-1) == 1 for each in (key, value))
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.shape[-1] in _WIDTHS
        and key.shape[2] > 0
        and serves_mask(mask, len(query), key.shape[2])
    )


def serves_mask(mask: torch.Tensor | None, rows: int, length: int) -> bool:
    """Whether the kernel takes a mask for so many rows and keys: one for all heads, with a value for each key, which
    is whether it is seen, or what is added to its score, bfloat16."""
    return mask is None or (
        mask.dtype in (torch.bool, torch.bfloat16)
        and mask.shape[1:] == (1, 1, length)
        and len(mask) in (1, rows)
        and mask.device.type == "cpu"
        and mask.stride(-1) == 1
    )


def one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [B, H, 1, D], key and value [B, H / G, L, D] -> as query.

    mask [B or 1, 1, 1, L]: true where a key is seen, or bfloat16 to be added to scores. sinks [H], bfloat16: a score of
    each head that goes to no value.

    Computed on `own_threads.count()` threads, with the same bits on any number of them.
    """
    query = query.contiguous()
    y = torch.empty_like(query)
    room = torch.empty(room_words(query.shape, key.shape), dtype=torch.int32, device="cpu")
    lib = native.library()
    assert lib is not None
    told = job(query.data_ptr(), query.shape[1], key, value, mask, y.data_ptr(), room.data_ptr(), scale, sinks)
    lib.attention(told, own_threads.count())
    return y


def room_words(query: Sequence[int], key: Sequence[int]) -> int:
    """How many words of room the kernel takes for queries and keys of these shapes."""
    rows, heads, _, width = query
    shared, length = key[1:3]
    parts = rows * shared * -(-length // _PART)
    return parts * -(-heads // shared // _QUERIES) * _QUERIES * (width + 2)


def job(
    query: int,
    heads: int,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    y: int,
    room: int,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> bytes:
    """What the kernel is told: see `one_token`. Queries, results and room are addresses."""
    rows, shared, length, width = key.shape
    masked = (0, 0, 0)
    if mask is not None:
        masked = mask.data_ptr(), mask.stride(0) if len(mask) > 1 else 0, mask.dtype != torch.bool
    return _JOB.pack(
        query,
        key.data_ptr(),
        value.data_ptr(),
        *key.stride()[:3],
        *value.stride()[:3],
        *masked,
        0 if sinks is None else sinks.data_ptr(),
        y,
        room,
        rows,
        shared,
        heads // shared,
        length,
        width,
        scale,
    )
