"""Which bytes of which file hold each tensor of a safetensors checkpoint: learnt from headers alone.

A shard is 8 bytes (the header's length, little endian), the header (JSON: name -> dtype, shape, offsets) and
the tensors back to back, without gaps (https://github.com/huggingface/safetensors). So headers and file sizes
together show every missing, truncated or damaged shard before one weight is read.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cache.errors import CheckpointError
from offload.checkpoint.adapters import adapter_alone, without_adapter
from offload.checkpoint.config.json_object import read_json_object
from offload.checkpoint.hub.pointers import is_pointer, pointer
from offload.system.seen import SeenFile

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

_MOST_BYTES = 100_000_000  # of an index and, as in the safetensors library, of a header
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_PART = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at absolute byte `offset` of `file`, C-contiguous, little endian.

    `file` is the shard's absolute path, or its name when the index describes files that are not on this disk.
    `dtype` is the safetensors code, such as "BF16".
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class ShardIndex(Mapping[str, TensorInfo]):
    """All tensors of a checkpoint by name, in the order of the shards and of the bytes inside each.

    `folder` is where the shards are (None for a remote checkpoint); `file_sizes` gives each shard's total
    bytes, keyed like `TensorInfo.file`, and `files` what was seen of those on this disk.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        file_sizes: Mapping[str, int],
        folder: Path | None = None,
        files: Mapping[str, SeenFile] | None = None,
    ) -> None:
        self.files = dict(files or {})
        self._tensors = dict(tensors)
        self.file_sizes = dict(file_sizes)
        self.folder = folder

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ShardIndex:
        """Index the checkpoint in `folder`, reading nothing but the index file and the headers.

        Raises CheckpointError, naming the file, for weights that are missing, truncated, damaged, unreadable
        or only there as pickles.
        """
        folder = Path(folder).absolute()
        try:
            names = {path.name for path in folder.iterdir() if path.is_file()}
            weight_map = None
            if INDEX_NAME in names:
                weight_map = read_weight_map(folder / INDEX_NAME)
                names |= {shard for shard in set(weight_map.values()) if (folder / shard).is_file()}
            shards = select_shards(names, weight_map, str(folder))
            seen = {shard: SeenFile(folder / shard) for shard in shards}
            sizes = {shard: file.size for shard, file in seen.items()}
            headers = {shard: read_header(folder / shard, sizes[shard]) for shard in shards}
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error
        index = cls.from_headers(headers, sizes, weight_map=weight_map, folder=folder)
        index.files = {file.path: file for file in seen.values()}
        return index

    @classmethod
    def from_headers(
        cls,
        headers: Mapping[str, bytes],
        sizes: Mapping[str, int],
        *,
        weight_map: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> ShardIndex:
        """Index shards from the first bytes of each (at least up to its header's end) and its size in bytes.

        With a `weight_map` every tensor it lists must be in the shard it names. Raises CheckpointError.
        """
        tensors: dict[str, TensorInfo] = {}
        files = {shard: str(folder / shard) if folder else shard for shard in headers}
        for shard, header in headers.items():
            for name, tensor in parse_header(header, sizes[shard], files[shard]).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{files[shard]}: tensor {name} is in {tensors[name].file} too: remove the wrong file"
                    )
                tensors[name] = tensor
        for name, shard in (weight_map or {}).items():
            if name not in tensors or tensors[name].file != files[shard]:
                raise CheckpointError(
                    f"{files[shard]}: does not hold tensor {name}, which {INDEX_NAME} places there: "
                    "copy or download both files again"
                )
        return cls(tensors, {files[shard]: sizes[shard] for shard in headers}, folder)


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> shard name, from the index file at `path`.

    Raises CheckpointError for anything else, and for shards that would lie outside the checkpoint's folder.
    """
    weight_map = read_json_object(path, most_bytes=_MOST_BYTES).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(s, str) for s in weight_map.values())):
        raise CheckpointError(f"{path}: its weight_map does not say where each tensor is: {_AGAIN}")
    for shard in sorted(set(weight_map.values())):
        place = PurePosixPath(shard.replace("\\", "/"))
        outside = place.is_absolute() or ".." in place.parts or ":" in shard
        if outside or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f'{path}: "{shard}" is not a .safetensors file inside the checkpoint: use another checkpoint'
            )
    return {name: str(PurePosixPath(shard)) for name, shard in weight_map.items()}  # "./x" is "x", and no second file


def select_shards(names: Collection[str], weight_map: Mapping[str, str] | None, where: str) -> list[str]:
    """The shards of the checkpoint, sorted, among the files `names` of `where` (a folder or a hub id).

    They are the weight map's if there is one, else `model.safetensors`, else every `model*.safetensors` (some
    checkpoints keep a second, consolidated copy beside these), else every `*.safetensors`.
    Raises CheckpointError when a shard is missing or there are no safetensors weights.
    """
    if weight_map is not None:
        shards = set(weight_map.values())
        missing, expected = min(shards - set(names), default=None), len(shards)
    else:
        shards = without_adapter([name for name in names if name.endswith(".safetensors") and "/" not in name])
        shards = {name for name in shards if name.startswith("model")} or shards
        shards = {SINGLE_NAME} if SINGLE_NAME in shards else shards
        missing, expected = _first_missing_part(shards)
    if missing is not None:
        raise CheckpointError(
            f"{where}: shard {missing} is missing ({len(shards & set(names))} of {expected} are there): "
            "copy or download the missing files"
        )
    if shards:
        return sorted(shards)
    if adapter := adapter_alone(names):
        raise CheckpointError(f"{where}: {adapter}")
    if pickles := sorted(name for name in names if name.endswith(_PICKLE_SUFFIXES)):
        raise CheckpointError(
            f"{where}: its weights are only there as pickles ({pickles[0]}), which can run code when opened: "
            "use a checkpoint in the safetensors format"
        )
    raise CheckpointError(f"{where}: holds no .safetensors weights: use a checkpoint in the safetensors format")


def parse_header(header: bytes, size: int, file: str) -> dict[str, TensorInfo]:
    """The tensors of one shard, by offset. `header` is the file's first bytes, `size` its bytes in all.

    Raises CheckpointError, naming `file`, unless the header is sound and its tensors fill the rest exactly.
    """
    start = data_start(header, size, file)
    try:
        entries = json.loads(header[8:start].decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header of {start - 8} bytes is not JSON: {_AGAIN}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: its header is not a JSON object: {_AGAIN}")
    metadata = entries.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise CheckpointError(f"{file}: its header's metadata is not names and texts: {_AGAIN}")
    tensors = [_tensor(name, entry, start, file) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            problem = "overlaps the one before, which" if tensor.offset < end else "follows a gap: the one before"
            raise CheckpointError(
                f"{file}: tensor {tensor.name} at byte {tensor.offset} {problem} ends at byte {end}: {_AGAIN}"
            )
        end += tensor.nbytes
    if size < end:
        raise CheckpointError(f"{file}: truncated, it holds {size} of {end} bytes: {_AGAIN}")
    if size > end:
        raise CheckpointError(f"{file}: holds {size} bytes, {size - end} more than its header says: {_AGAIN}")
    return {tensor.name: tensor for tensor in tensors}


def data_start(prefix: bytes, size: int, file: str) -> int:
    """Byte at which the tensors start, from the first 8 bytes of a file of `size` bytes.

    Raises CheckpointError, naming `file`, when the file cannot hold such a header.
    """
    if size < 8 or len(prefix) < 8:
        raise CheckpointError(f"{file}: truncated, it holds {size} bytes, not even a header's length: {_AGAIN}")
    if is_pointer(prefix):
        raise CheckpointError(pointer(file))
    length = int.from_bytes(prefix[:8], "little")
    if length > _MOST_BYTES:
        raise CheckpointError(f"{file}: not a safetensors file (a header of {length} bytes): {_AGAIN}")
    if 8 + length > size:
        raise CheckpointError(
            f"{file}: truncated, it holds {size} bytes but its header ends at byte {8 + length}: {_AGAIN}"
        )
    return 8 + length


def read_header(path: Path, size: int) -> bytes:
    """The first bytes of the shard at `path` (of `size` bytes), up to where its tensors start."""
    with path.open("rb") as file:
        prefix = file.read(8)
        return prefix + file.read(data_start(prefix, size, str(path)) - 8)


def _tensor(name: str, entry: Any, start: int, file: str) -> TensorInfo:
    """One entry of the header of `file`, whose tensors start at byte `start`."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: its header's entry for tensor {name} is damaged: {_AGAIN}")
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f'{file}: tensor {name} has an unknown dtype "{dtype}": use another checkpoint')
    if math.prod(shape) * DTYPE_BITS[dtype] != 8 * (end - begin):
        raise CheckpointError(
            f"{file}: tensor {name} is {dtype} {list(shape)}, which is not the {end - begin} bytes between "
            f"its offsets {begin} and {end}: {_AGAIN}"
        )
    return TensorInfo(file, name, dtype, tuple(shape), start + begin, end - begin)


def _first_missing_part(shards: Collection[str]) -> tuple[str | None, int]:
    """What the names of numbered shards promise: the first that is missing, and how many there should be.

    "x-1-of-2" promises "x-2-of-2"; names without such numbers promise nothing more than themselves.
    """
    parts = [match for match in map(_PART.fullmatch, shards) if match]
    missing: list[str] = []
    expected = len(shards) - len(parts)
    for stem, width, count in {(match[1], len(match[2]), match[3]) for match in parts}:
        from_zero = f"{stem}-{0:0{width}}-of-{count}.safetensors" in shards
        numbers = range(int(count)) if from_zero else range(1, int(count) + 1)
        names = (f"{stem}-{number:0{width}}-of-{count}.safetensors" for number in numbers)
        missing += itertools.islice((name for name in names if name not in shards), 1)
        expected += int(count)
    return min(missing, default=None), expected
