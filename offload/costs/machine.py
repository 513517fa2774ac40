"""What one machine was measured to do: the machine profile, a small JSON file.

`offload profile` measures it, `offload.costs.model` answers questions from it. Seconds are medians; nothing in a
profile depends on a model.
"""

from __future__ import annotations

import json
import math
import os
import types
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from cache.errors import ProfileError
from cache.outputs import output
from cache.types import Tier

FORMAT = "offload-machine-profile"
VERSION = 3


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by size, measured at ascending sizes `at` (bytes, or tokens)."""

    at: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.at or len(self.at) != len(self.seconds):
            raise ProfileError(f"a curve of {len(self.at)} sizes and {len(self.seconds)} times: one time for each size")
        if self.at[0] < 1 or any(a >= b for a, b in zip(self.at, self.at[1:], strict=False)):
            raise ProfileError(f"the sizes of a curve are not ascending from 1: {list(self.at)}")
        _check_not_negative("seconds of a curve", *self.seconds)

    def __call__(self, size: float) -> float:
        """Seconds at `size`: linear between measured sizes, the first below them, at the last one's rate above."""
        if size >= self.at[-1]:
            return self.seconds[-1] * size / self.at[-1]
        if size <= self.at[0]:
            return self.seconds[0]
        right = bisect_left(self.at, size)
        left = right - 1
        share = (size - self.at[left]) / (self.at[right] - self.at[left])
        return self.seconds[left] + share * (self.seconds[right] - self.seconds[left])


@dataclass(frozen=True, slots=True)
class BlockReads:
    """Direct reads of `block_bytes` at random places of a file, by so many threads at once, all together."""

    block_bytes: int
    threads: int
    bytes_per_s: float

    def __post_init__(self) -> None:
        _check_positive("disk.blocks", self.block_bytes, self.threads, self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """Reading experts from disk into host memory with all of the engine's `readers` at work on each, by record bytes.

    `alone`: from the request to the landing, the disk being idle before. `streamed`: from one landing to the next where
    many were asked for at once.
    """

    readers: int
    alone: Curve
    streamed: Curve
    blocks: tuple[BlockReads, ...]
    """The disk itself, without the engine: a table that shows what a block size and more threads bring."""

    def __post_init__(self) -> None:
        _check_positive("disk.readers", self.readers)


@dataclass(frozen=True, slots=True)
class CopyTime:
    """Copying n bytes takes `latency_s` + n / `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        _check_not_negative("latency_s", self.latency_s)
        _check_positive("bytes_per_s", self.bytes_per_s)

    def __call__(self, nbytes: int) -> float:
        """Seconds for `nbytes`."""
        return self.latency_s + nbytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """Copying from host memory to the accelerator: from `pinned` memory, which the runtime copies from, and from
    pageable; alone, and while the CPU computes experts of its own, which takes bandwidth of the same memory."""

    pinned: CopyTime
    pinned_computing: CopyTime
    pageable: CopyTime
    pageable_computing: CopyTime


@dataclass(frozen=True, slots=True)
class ProductCurve:
    """Computing with weights that come from memory, not from the processor's cache: seconds by number of tokens.

    `shape` is (hidden, intermediate) of an expert, or (inputs, outputs) of one dense matrix; `weight_bytes` is what it
    takes in memory, `threads` how many computed.
    """

    format: str
    shape: tuple[int, int]
    weight_bytes: int
    threads: int
    seconds: Curve
    extrapolated: tuple[int, ...] = ()
    """The counts of tokens whose seconds are estimated by others: measuring them would have taken too long."""

    def __post_init__(self) -> None:
        _check_positive("weight_bytes, threads", self.weight_bytes, self.threads)


@dataclass(frozen=True, slots=True)
class ComputeProfile:
    """What one tier's processor does, with the `threads` that the runtime gives it."""

    device: str
    threads: int
    experts: tuple[ProductCurve, ...]
    """One expert, by format and shape."""
    dense: tuple[ProductCurve, ...]
    """One dense matrix, by format."""
    layer_overhead: Curve
    """What a MoE layer takes beyond its products, by tokens: the modules around, router, decision, gather and sum."""
    expert_overhead_s: float
    """What each expert of an event adds to that."""
    pass_overhead_s: float
    """What a forward pass takes beyond its layers, the generation loop included."""
    reading_slowdown: float
    """How many times longer an expert takes to compute while others are read from disk."""
    computing_slowdown: float
    """How many times longer an expert takes to read while others are computed."""

    def __post_init__(self) -> None:
        _check_positive("threads", self.threads)
        _check_not_negative("overheads", self.expert_overhead_s, self.pass_overhead_s)
        if min(self.reading_slowdown, self.computing_slowdown) < 1:
            raise ProfileError("a slowdown is a factor of at least 1")
        for name, curves in (("experts", self.experts), ("dense", self.dense)):
            if not curves:
                raise ProfileError(f"no measurement of {name}: measure again with: offload profile")


@dataclass(frozen=True)
class MachineProfile:
    """Everything measured of one machine. `link` is None where there is no accelerator."""

    disk: DiskProfile
    host_read_bytes_per_s: float
    """Reading memory with all the threads that compute: no product with weights from memory is faster."""
    host_copy_bytes_per_s: float
    """By one thread."""
    packing_bytes_per_s: Mapping[str, float]
    """How fast one reader turns a record of experts into what is computed with, in bytes of the record, by format;
    those that are computed as they are stored are missing."""
    cpu_start_s: float
    """Handing work from the thread that computes to another one, and getting word that it is done."""
    link: LinkProfile | None
    link_stated_bytes_per_s: float | None
    """What an emulated link was said to do; None for a real one."""
    compute: Mapping[Tier, ComputeProfile]
    about: Mapping[str, str]
    """What it was measured on: processor, cores, disk folder, versions."""
    busy: str | None = None
    """What else the machine did meanwhile, so that its times are those of a busy machine; None: nothing of note."""
    estimated: str | None = None
    """Where the figures come from that nobody measured; None: they were measured."""

    def __post_init__(self) -> None:
        _check_positive("host bytes_per_s", self.host_read_bytes_per_s, self.host_copy_bytes_per_s)
        _check_positive("packing_bytes_per_s", *self.packing_bytes_per_s.values())
        _check_not_negative("cpu_start_s", self.cpu_start_s)
        if not self.compute or Tier.DISK in self.compute:
            raise ProfileError("compute has the tiers cpu and gpu, at least one of them")

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it."""
        values = asdict(self)
        values["compute"] = {tier.value: values for tier, values in values["compute"].items()}
        return {"format": FORMAT, "version": VERSION, **values}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to `path`, whole or not at all. Raises OutputError and DiskSpaceError."""
        with output(path) as file:
            file.write(json.dumps(self.as_dict(), indent=1, allow_nan=False).encode() + b"\n")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> MachineProfile:
        """The profile in `path`. Raises ProfileError, saying where, for a file that is none, or of another version."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(
                f"{path} cannot be read: {error.strerror or error}: measure this machine with: offload profile"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{path} is not JSON ({error}): measure again with: offload profile") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ProfileError(f'{path} is not a machine profile: it does not say "format": "{FORMAT}"')
        if values.get("version") != VERSION:
            raise ProfileError(
                f"{path} is a machine profile of version {values.get('version')}, "
                f"this program reads version {VERSION}: measure again with: offload profile"
            )
        try:
            profile: MachineProfile = decode(cls, values, "")
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from error
        return profile


def decode(kind: Any, value: Any, where: str) -> Any:
    """JSON's `value` as `kind`: a number, a text, a tuple, a mapping, an optional or a dataclass of these.

    `where` is its place in the file. Raises ProfileError that says where something is missing, or is something else.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return None if value is None else decode(arguments[0], value, where)
    if origin is tuple:
        items = _expect(list, value, where)
        kinds = arguments[:1] * len(items) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(items):
            raise ProfileError(f"{where} has {len(items)} entries, not {len(kinds)}")
        return tuple(decode(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, items, strict=True)))
    if origin is not None:  # a mapping
        return {
            decode(arguments[0], name, where): decode(arguments[1], item, f"{where}.{name}")
            for name, item in _expect(dict, value, where).items()
        }
    if kind is Tier:
        if value not in list(Tier):
            raise ProfileError(f'{where}: "{value}" is not a tier')
        return Tier(value)
    if kind in (int, float, str):
        return _expect(kind, value, where)
    hints, given = get_type_hints(kind), _expect(dict, value, where or "the profile")
    arguments_by_name = {}
    for field in fields(kind):
        path = f"{where}.{field.name}".lstrip(".")
        if field.name not in given:
            if field.default is not MISSING:
                continue
            raise ProfileError(f"{path} is missing")
        arguments_by_name[field.name] = decode(hints[field.name], given[field.name], path)
    try:
        return kind(**arguments_by_name)
    except ProfileError as error:
        raise ProfileError(f"{where}: {error}" if where else str(error)) from error


def _expect(kind: type[Any], value: Any, where: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ProfileError(f"{where} is {json.dumps(value)[:40]}, where JSON's {_JSON_NAMES[kind]} is expected")
    return value


_JSON_NAMES = {int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def _check_positive(what: str, *values: float) -> None:
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ProfileError(f"{what}: {', '.join(map(str, values))} is not a positive number")


def _check_not_negative(what: str, *values: float) -> None:
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ProfileError(f"{what}: {', '.join(map(str, values))}: all must be numbers from 0")
