"""Measures this machine: disk, memory, link, processor, and the runtime's own overhead, with the runtime's own parts.

Takes well under a minute on a machine that does nothing else; the times of a busy machine are those of a busy machine.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from cache.errors import ProfileError
from cache.machine import ComputeProfile, LinkProfile, MachineProfile
from cache.types import Tier
from offload import probe_compute, probe_disk, probe_overhead
from offload.arena import HostRegion
from offload.device import CpuDevice, Device, EmulatedDevice
from offload.probe_compute import ComputeProbe
from offload.probe_disk import DiskProbe, open_probe, slowdowns
from offload.probe_overhead import measure_overhead
from offload.sizes import format_bytes
from offload.timing import median_s, torch_threads

_CONTENTION_RECORD_BYTES = 8 * 2**20
_CONTENTION_SHAPE = (2048, 768)  # an expert of 9 MiB in bf16


@dataclass(frozen=True)
class Extent:
    """What is measured: the defaults are what `offload profile` does."""

    file_bytes: int = probe_disk.FILE_BYTES
    record_bytes: Sequence[int] = probe_disk.RECORD_BYTES
    formats: Sequence[str] = tuple(probe_compute.FORMATS)
    expert_shapes: Sequence[tuple[int, int]] = probe_compute.EXPERT_SHAPES
    tokens: Sequence[int] = probe_compute.TOKENS
    overhead_tokens: Sequence[int] = probe_overhead.TOKENS
    overhead_rounds: int = 3
    block_bytes: int | None = None
    copy_bytes: Sequence[int] = (2**18, 2**21, 2**23, 2**25)


def measure_machine(
    disk: Path,
    device: Device,
    threads: int | None = None,
    extent: Extent | None = None,
    on_step: Callable[[str], object] = lambda step: None,
) -> MachineProfile:
    """Measures the disk that `disk` is on, the CPU with `threads` threads (default: torch's), and `device` if it is not
    the CPU.

    `on_step` is told what is measured next. Side effects: a temporary file on the disk, deleted at the end, and memory
    of a few times the processor's cache. Raises DiskSpaceError, ProfileError and TransferError.
    """
    extent = extent or Extent()
    threads = threads or torch.get_num_threads()
    cpu = CpuDevice()
    on_step("writing a file to read")
    with open_probe(disk, extent.file_bytes, extent.record_bytes) as probe:
        on_step("reading experts from disk")
        disk_profile = probe.measure()
        on_step("computing while reading")
        contention = _contention(probe, ComputeProbe(cpu, threads, extent.block_bytes), extent)
    on_step("copying in memory")
    host_copy_bytes_per_s = _host_copy_bytes_per_s(max(extent.copy_bytes))
    compute = {Tier.CPU: _compute(cpu, threads, extent, contention, on_step)}
    if device.is_accelerator:
        on_step(f"copying to {device.name}")
        link = measure_link(device, extent.copy_bytes)
        own_threads = 1 if isinstance(device, EmulatedDevice) else threads
        # An accelerator computes with cores and memory of its own: reading from disk leaves it alone.
        compute[device.tier] = _compute(device, own_threads, extent, (1.0, 1.0), on_step)
    return MachineProfile(
        disk=disk_profile,
        host_copy_bytes_per_s=host_copy_bytes_per_s,
        link=link if device.is_accelerator else None,
        compute=compute,
        about=_about(disk, device),
    )


def measure_link(device: Device, copy_bytes: Sequence[int]) -> LinkProfile:
    """Copies of several sizes over the device's link: the rate is that between the smallest and the largest size."""
    host, there = device.host_slots(1, max(copy_bytes))[0], device.allocate(1, max(copy_bytes))[0]

    def copy(nbytes: int) -> None:
        device.copy(there[:nbytes], host[:nbytes], device.fence())

    times = {nbytes: median_s(partial(copy, nbytes), budget_s=0.2) for nbytes in sorted(copy_bytes)}
    small, large = min(times), max(times)
    if times[large] <= times[small]:
        raise ProfileError(
            f"copying {format_bytes(large)} to {device.name} took no longer than {format_bytes(small)}: "
            "this machine is too busy to be measured; try again when it is idle"
        )
    bytes_per_s = (large - small) / (times[large] - times[small])
    return LinkProfile(max(times[small] - small / bytes_per_s, 0.0), bytes_per_s)


def busy_cores() -> float | None:
    """How many cores were busy or wanted over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _contention(probe: DiskProbe, compute: ComputeProbe, extent: Extent) -> tuple[float, float]:
    """How computing on the CPU and reading slow each other down: (computing's factor, reading's factor)."""
    format, shape = extent.formats[0], min(extent.expert_shapes, key=lambda shape: shape != _CONTENTION_SHAPE)
    record_bytes = min(probe.record_bytes, key=lambda nbytes: abs(nbytes - _CONTENTION_RECORD_BYTES))
    with torch_threads(compute.threads):
        return slowdowns(probe, partial(compute.expert_call(format, shape), 1), record_bytes)


def _compute(
    device: Device, threads: int, extent: Extent, contention: tuple[float, float], on_step: Callable[[str], object]
) -> ComputeProfile:
    probe = ComputeProbe(device, threads, extent.block_bytes)
    experts = []
    for format in extent.formats:
        for hidden, intermediate in extent.expert_shapes:
            on_step(f"computing {format} experts of {hidden} x {intermediate} on {device.name}")
            experts.append(probe.expert(format, (hidden, intermediate), extent.tokens))
    on_step(f"computing dense layers on {device.name}")
    dense = [probe.dense(format, tokens=extent.tokens) for format in extent.formats]
    on_step(f"running tiny models on {device.name}")
    overhead = measure_overhead(device, extent.overhead_tokens, extent.overhead_rounds)
    return ComputeProfile(
        device=device.name,
        threads=threads,
        experts=tuple(experts),
        dense=tuple(dense),
        layer_overhead=overhead.layer,
        expert_overhead_s=overhead.expert_s,
        pass_overhead_s=overhead.pass_s,
        reading_slowdown=contention[0],
        computing_slowdown=contention[1],
    )


def _host_copy_bytes_per_s(nbytes: int) -> float:
    source, destination = (HostRegion(4 * nbytes).tensor.split(nbytes) for _ in range(2))
    turns = [0]

    def copy() -> None:  # other memory each time, so that it does not come from the processor's cache
        turns[0] = (turns[0] + 1) % len(source)
        destination[turns[0]].numpy()[:] = source[turns[0]].numpy()

    return nbytes / median_s(copy, budget_s=0.3)


def _about(disk: Path, device: Device) -> Mapping[str, str]:
    busy = busy_cores()
    return {
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory_bytes": str(psutil.virtual_memory().total),
        "disk": str(disk),
        "device": device.name,
        "busy_cores": "unknown" if busy is None else f"{busy:.1f}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
