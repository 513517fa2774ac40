"""Tiny checkpoints converted to records."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.shards import ShardIndex
from offload.store.convert import convert
from offload.store.index import Origin, StoreIndex

NAMES = ("bf16", "int8", "nf4", "nested")


def mapped(folder: Path) -> ExpertMap:
    return tiny.expert_map(folder, torch.bfloat16)


def origin(folder: Path) -> Origin:
    return Origin.of(folder.name, None, ShardIndex.from_folder(folder), mapped(folder))


def converted(folder: Path, to: Path, names: tuple[str, ...] = NAMES) -> StoreIndex:
    return convert(to, origin(folder), mapped(folder), names)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "lock"}


def keys(experts: ExpertMap) -> list[ExpertKey]:
    return [ExpertKey(layer.index, expert) for layer in experts.layers for expert in range(layer.num_experts)]
