"""The files of a checkpoint as a hub repository holds them, and as the cache does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from offload.checkpoint.shards import INDEX_NAME

MIB = 1 << 20
MODEL = "acme/moe"
TEXT_FILES = {
    "config.json": b'{"model_type": "mixtral"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"legacy": false}',
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# read me",
    "modeling_acme.py": b"raise SystemExit",
}


def shard(tensors: dict[str, int], seed: int) -> bytes:
    """A safetensors file of random bytes: U8 vectors of the given lengths."""
    entries, end = {}, 0
    for name, length in tensors.items():
        entries[name] = {"dtype": "U8", "shape": [length], "data_offsets": [end, end + length]}
        end += length
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + np.random.default_rng(seed).bytes(end)


def checkpoint(shards: int = 4, shard_bytes: int = MIB, tensors: int = 8) -> dict[str, bytes]:
    """The files of a sharded checkpoint, as a hub repository holds them."""
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    parts = [{f"layers.{i}.{j}": shard_bytes // tensors for j in range(tensors)} for i in range(shards)]
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    weights = {name: shard(part, seed) for seed, (name, part) in enumerate(zip(names, parts, strict=True))}
    return TEXT_FILES | {INDEX_NAME: json.dumps({"weight_map": weight_map}).encode()} | weights


def weights_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


def assert_complete(folder: Path, files: dict[str, bytes]) -> None:
    wanted = {name: content for name, content in files.items() if name not in ("README.md", "modeling_acme.py")}
    assert {path.name for path in folder.iterdir()} == set(wanted)
    for name, content in wanted.items():
        assert (folder / name).read_bytes() == content, name
    assert not list(folder.parents[1].glob("blobs/*incomplete*"))


def arrived(cache: Path) -> int:
    """Weights that have arrived in the cache so far, finished or not."""
    files = [path for path in cache.glob("*/blobs/*") if len(path.name.split(".")[0]) == 64]
    return sum(path.stat().st_size for path in files)
