"""Machines that nobody measured: profiles estimated from what their makers specify.

`machines/NAME.json` has the specifications of one machine, with their sources; this file has what is left of them in
practice, the same for all machines. docs/costs.md says both. Good for "what would such a machine do", and no more.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from cache.errors import ProfileError
from cache.types import Tier
from offload.costs.machine import (
    BlockReads,
    ComputeProfile,
    CopyTime,
    Curve,
    DiskProfile,
    LinkProfile,
    MachineProfile,
    ProductCurve,
    decode,
)
from offload.costs.precision import PLAIN_BITS, QUANTISED_BITS

# Shares of what is specified.
MEMORY = 0.75
"""Of the memory channels' rate, what all cores read together; of a GPU's memory, too."""
COPYING = 0.25
"""Of the memory channels' rate, what one thread copies, which reads and writes."""
PACKING = 0.1
"""Of the memory channels' rate, how fast one thread puts quantised records into the kernels' order."""
CPU_ARITHMETIC = 0.4
"""Of cores, turbo clock and operations a cycle: all cores together are slower than one, and no product is perfect."""
GPU_ARITHMETIC = 0.5
DISK = 0.8
LINK = 0.8
PAGEABLE = 0.5
"""Of the rate from pinned memory, what a copy from pageable memory has."""

# No maker specifies these.
DISK_LATENCY_S = 100e-6
LINK_LATENCY_S = 10e-6
LAUNCH_S = 5e-6
"""Launching a kernel on a GPU, as is commonly measured."""
EXPERT_LAUNCHES = 4
CALL_S = 30e-6
"""The least that a product takes on a CPU: what `offload profile` measured of tiny experts on an AMD EPYC."""
LAYER_OVERHEAD = Curve((1, 32), (0.3e-3, 5e-3))
"""A layer of the runtime, in Python, by tokens: from the same measurement, of two cores; as are the next two."""
PASS_OVERHEAD_S = 1e-3
CPU_START_S = 60e-6

FORMAT = "offload-machine-specification"
VERSION = 1
_FOLDER = Path(__file__).parent / "machines"
_BITS = {"bf16": PLAIN_BITS["bf16"], "fp32": PLAIN_BITS["fp32"], **QUANTISED_BITS, "int4": 4.5, "int2": 2.5}
_DENSE = ("bf16", "fp32", "nf4", "int8")
_EXPERT_SHAPES = ((576, 64), (2048, 768), (2880, 2880), (4096, 14336))  # (hidden, intermediate), three matrices each
_DENSE_SHAPE = (2048, 4096)
_TOKENS = (1, 8, 32, 128, 512)
_RECORDS = (2**18, 2**20, 2**22, 2**24, 2**26)
_READERS = 4


@dataclass(frozen=True, slots=True)
class Processor:
    """`cores` that compute, at a turbo clock of `ghz`, with so many float32 operations a cycle each."""

    name: str
    cores: int
    ghz: float
    flops_per_cycle: int


@dataclass(frozen=True, slots=True)
class Part:
    """Memory, a disk or a link: what its maker says that it moves."""

    name: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU: its memory, and its dense operations with 16 bits and float32 sums."""

    name: str
    memory_bytes: int
    bytes_per_s: float
    flops: float


@dataclass(frozen=True)
class Specification:
    """A machine as its makers specify it. `gpu` and `link` are both None where there is no accelerator."""

    estimated: str
    what: str
    cpu: Processor
    memory: Part
    disk: Part
    gpu: Accelerator | None
    link: Part | None
    sources: tuple[str, ...]

    def profile(self, name: str) -> MachineProfile:
        """What a measurement of it would have found, as far as specifications tell."""
        read = MEMORY * self.memory.bytes_per_s
        disk = DISK * self.disk.bytes_per_s
        flops = CPU_ARITHMETIC * self.cpu.cores * self.cpu.ghz * 1e9 * self.cpu.flops_per_cycle
        # Reads from disk arrive in the memory that experts are computed from.
        compute = {Tier.CPU: _computing("cpu", self.cpu.cores, read, flops, CALL_S, CALL_S, 1 + disk / read)}
        if self.gpu is not None:
            least, rate = EXPERT_LAUNCHES * LAUNCH_S, MEMORY * self.gpu.bytes_per_s
            compute[Tier.GPU] = _computing("cuda", 1, rate, GPU_ARITHMETIC * self.gpu.flops, least, LAUNCH_S, 1.0)
        packing = PACKING * self.memory.bytes_per_s
        return MachineProfile(
            disk=_disk(disk),
            host_read_bytes_per_s=read,
            host_copy_bytes_per_s=COPYING * self.memory.bytes_per_s,
            packing_bytes_per_s={"nf4": packing, "int4": packing},
            cpu_start_s=CPU_START_S,
            link=None if self.link is None else _link(LINK * self.link.bytes_per_s, read),
            link_stated_bytes_per_s=None,
            compute=compute,
            about=self._about(name),
            estimated=f"{name}: {self.estimated}",
        )

    def _about(self, name: str) -> dict[str, str]:
        named = {"cpu": self.cpu.name, "memory": self.memory.name, "disk": self.disk.name}
        if self.gpu is not None and self.link is not None:
            named |= {"gpu": self.gpu.name, "link": self.link.name}
        return {"machine": f"{name}, {self.what}", **named, "sources": "; ".join(self.sources)}


def stock_names() -> list[str]:
    """The machines that there are."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def stock_machine(name: str) -> MachineProfile:
    """The profile of the stock machine `name`. Raises ProfileError for one that is not there, naming those that are."""
    if name not in stock_names():
        raise ProfileError(f'no machine is called "{name}": choose one of {", ".join(stock_names())}, or name a file')
    values = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise ProfileError(f"{name}.json is no specification of a machine: install offload again")
    found: Specification = decode(Specification, values, "")
    return found.profile(name)


def find_machine(name: str | os.PathLike[str]) -> MachineProfile:
    """The machine's profile in the file `name`, or the stock machine of that name where there is no such file.

    Raises ProfileError for a file that is none, and for a name that nobody has; OSError for a path that is not there.
    """
    path = Path(name)
    if not path.exists() and path.name == os.fspath(name) and not path.suffix:
        return stock_machine(path.name)
    path.open().close()  # what cannot be opened is told as of every other file
    return MachineProfile.read(path)


def _computing(
    device: str, threads: int, rate: float, flops: float, expert_s: float, dense_s: float, reading_slowdown: float
) -> ComputeProfile:
    """A processor that reads weights at `rate`, or computes at `flops`, whichever takes longer; and what is least."""

    def curve(format: str, shape: tuple[int, int], matrices: int, least_s: float) -> ProductCurve:
        weights = matrices * shape[0] * shape[1]
        nbytes = round(weights * _BITS[format] / 8)
        seconds = (least_s + max(nbytes / rate, 2 * weights * tokens / flops) for tokens in _TOKENS)
        return ProductCurve(format, shape, nbytes, threads, Curve(_TOKENS, tuple(seconds)))

    return ComputeProfile(
        device=device,
        threads=threads,
        experts=tuple(curve(format, shape, 3, expert_s) for format in _BITS for shape in _EXPERT_SHAPES),
        dense=tuple(curve(format, _DENSE_SHAPE, 1, dense_s) for format in _DENSE),
        layer_overhead=LAYER_OVERHEAD,
        expert_overhead_s=0.0,
        pass_overhead_s=PASS_OVERHEAD_S,
        reading_slowdown=reading_slowdown,
        computing_slowdown=1.0,
    )


def _disk(rate: float) -> DiskProfile:
    streamed = tuple(nbytes / rate for nbytes in _RECORDS)
    return DiskProfile(
        readers=_READERS,
        alone=Curve(_RECORDS, tuple(DISK_LATENCY_S + seconds for seconds in streamed)),
        streamed=Curve(_RECORDS, streamed),
        blocks=tuple(
            BlockReads(nbytes, threads, min(rate, threads * nbytes / (DISK_LATENCY_S + nbytes / rate)))
            for nbytes in _RECORDS
            for threads in (1, 2, 4, 8)
        ),
    )


def _link(rate: float, memory_rate: float) -> LinkProfile:
    """A link at `rate`; while the CPU computes it has half of what memory gives, if that is less."""
    shared = min(rate, memory_rate / 2)
    rates = (rate, shared, PAGEABLE * rate, PAGEABLE * shared)
    return LinkProfile(*(CopyTime(LINK_LATENCY_S, each) for each in rates))
