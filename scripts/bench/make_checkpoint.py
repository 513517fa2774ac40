"""Write a sharded random checkpoint with a MoE family's true layer shape, laid out as on the hub.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 6 --out /data/qwen3-6l

For benchmarks: real shapes and real bytes without a download. Tensors are streamed to disk, so the script
needs little memory whatever the size. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cache.errors import DiskSpaceError, OffloadError
from offload.system.progress import progress_bar
from offload.system.sizes import format_bytes
from scripts.bench.families import FAMILIES, Family, Tensor, config_json, tensors

SHARD_BYTES = 3_000_000_000
STD = 0.02  # standard deviation of the weights: what these families initialise with
_POOL = 1 << 22  # random values drawn once; every tensor is made of pieces of them
_CHUNK = 1 << 20  # values written at a time
_UNIT = 6 << 7  # added to the bits of a bfloat16 it is a factor of 2**6, and 0.02 * 2**6 is about 1


class RandomBits:
    """Normal bfloat16 weights at disk speed.

    A pool of values is drawn once. A tensor is made of pieces of it, each from its own random place and with
    the signs of another place, so no two tensors are alike. Only `seed` and names decide. The embeddings' standard
    deviation is about `embedding_std`, a power of 2.
    """

    def __init__(self, seed: int, embedding_std: int = 1) -> None:
        self._seed = seed
        self._unit = _UNIT + (embedding_std.bit_length() - 1 << 7)
        rng = np.random.default_rng(seed)
        values = rng.standard_normal(_POOL + _CHUNK, dtype=np.float32) * np.float32(STD)
        rounded = (values.view(np.uint32) + 0x8000) >> 16  # float32 bits -> bfloat16 bits
        self._pool = rounded.astype(np.uint16)
        self._signs = rng.integers(0, 2, _POOL + _CHUNK, dtype=np.uint16) << 15

    def chunks(self, tensor: Tensor) -> Iterator[NDArray[np.uint16]]:
        """The bits of `tensor`, row-major, at most `_CHUNK` values at a time; the array is reused."""
        rng = np.random.default_rng([self._seed, *tensor.name.encode()])
        chunk = np.empty(_CHUNK, np.uint16)
        for start in range(0, tensor.values, _CHUNK):
            piece = chunk[: min(_CHUNK, tensor.values - start)]
            if tensor.fill == "ones":
                piece.fill(0x3F80)  # 1.0
            else:
                a, b = (int(offset) for offset in rng.integers(0, _POOL, 2))
                np.bitwise_xor(self._pool[a : a + piece.size], self._signs[b : b + piece.size], out=piece)
                if tensor.fill == "unit":
                    piece += self._unit
            yield piece


def split_shards(all_tensors: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Tensors in order, cut into shards of at most `shard_bytes` (one tensor at least)."""
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor in all_tensors:
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards


def write_shard(file: BinaryIO, shard: list[Tensor], bits: RandomBits, advance: Callable[[int], None]) -> None:
    """One safetensors file, its tensors sorted by name like the real ones'; `advance(bytes)` is progress."""
    shard = sorted(shard, key=lambda tensor: tensor.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in shard:
        for chunk in bits.chunks(tensor):
            file.write(chunk.data)
            advance(chunk.nbytes)


def write_checkpoint(
    family: Family,
    out: Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    embedding_std: int = 1,
    progress: bool = False,
) -> int:
    """Write the checkpoint to the new folder `out`; returns its bytes of weights.

    Everything is written beside `out` and renamed at the end, so `out` is complete or absent. Raises
    OffloadError when `out` is already there and DiskSpaceError when the disk is too small, before writing.
    """
    out = out.absolute()
    if out.exists():
        raise OffloadError(f"{out} already exists: remove it or choose another --out")
    all_tensors = list(tensors(family))
    total = sum(tensor.nbytes for tensor in all_tensors)
    out.parent.mkdir(parents=True, exist_ok=True)
    needed, free = total + 300 * len(all_tensors) + (1 << 20), shutil.disk_usage(out.parent).free
    if needed > free:
        raise DiskSpaceError(
            f"{out} needs {format_bytes(needed)}, {out.parent} has {format_bytes(free)} free: "
            "choose fewer --layers or another --out"
        )
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        bits = RandomBits(seed, embedding_std)
        _write_files(family, partial, split_shards(all_tensors, shard_bytes), bits, progress)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return total


def _write_files(family: Family, folder: Path, shards: list[list[Tensor]], bits: RandomBits, progress: bool) -> None:
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    weight_map: dict[str, str] = {}
    with progress_bar("writing", total, unit="bytes", show=progress) as bar:
        for number, shard in enumerate(shards, start=1):
            single = len(shards) == 1
            name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with (folder / name).open("wb") as file:
                write_shard(file, shard, bits, bar.advance)
                file.flush()
                os.fsync(file.fileno())
            weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config_json(family), indent=2) + "\n")


def _vocab(text: str) -> int | None:
    """The --vocab argument: a number of tokens, or "true" (None) for the family's own."""
    if text == "true":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r}: give a number of tokens or "true"')
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--like", required=True, choices=sorted(FAMILIES), help="the family to take the shape of")
    parser.add_argument("--layers", required=True, type=_positive, help="how many of its layers to write")
    parser.add_argument("--out", required=True, type=Path, help="the folder to create")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other weights (default 0)")
    parser.add_argument(
        "--vocab", type=_vocab, default=32000, help='tokens, or "true" for the family\'s own (default 32000)'
    )
    parser.add_argument("--experts", type=_positive, help="experts a layer (default: the family's own)")
    parser.add_argument(
        "--embedding-std",
        type=int,
        choices=(1, 2, 4, 8),
        default=1,
        help="the larger, the less each layer changes the hidden state, and the more of a later gate's choice can be "
        "told ahead: a layer of a deep trained model changes it little (default 1)",
    )
    args = parser.parse_args(argv)

    family = replace(FAMILIES[args.like], layers=args.layers)
    if args.vocab is not None:
        family = replace(family, vocab=args.vocab, token_ids={})
    if args.experts is not None:
        if args.experts < family.top_k:
            parser.error(f"--experts {args.experts}: {args.like} routes each token to {family.top_k}")
        family = replace(family, experts=args.experts)
    try:
        total = write_checkpoint(family, args.out, seed=args.seed, embedding_std=args.embedding_std, progress=True)
    except OffloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing was left behind", file=sys.stderr)
        return 130
    print(f"{args.out}: {format_bytes(total)} of weights, {family.layers} layers of {args.like}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
