"""Measures this machine: disk, memory, link, processor, and the runtime's own overhead, with the runtime's own parts.

Takes well under a minute on a machine that does nothing else; the times of a busy machine are those of a busy machine.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from cache.types import Tier
from offload.costs.machine import ComputeProfile, LinkProfile, MachineProfile
from offload.device.base import CpuDevice, Device
from offload.device.emulated import EmulatedDevice
from offload.machine import compute as probe_compute
from offload.machine import disk as probe_disk
from offload.machine import memory as probe_memory
from offload.machine import overhead as probe_overhead
from offload.machine.compute import ComputeProbe
from offload.machine.disk import DiskProbe, open_probe, slowdowns
from offload.machine.overhead import measure_overhead
from offload.machine.threads import torch_threads
from offload.system.cores import at_most_cores, usable_cores

_CONTENTION_RECORD_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Extent:
    """What is measured: the defaults are what `offload profile` does."""

    file_bytes: int = probe_disk.FILE_BYTES
    record_bytes: Sequence[int] = probe_disk.RECORD_BYTES
    disk_blocks: Sequence[int] = probe_disk.BLOCK_BYTES
    formats: Sequence[str] = probe_compute.FORMATS
    dense_formats: Sequence[str] = probe_compute.DENSE_FORMATS
    experts: Mapping[tuple[int, int], Sequence[int]] = field(default_factory=lambda: probe_compute.EXPERTS)
    dense_shape: tuple[int, int] = probe_compute.DENSE_SHAPE
    dense_tokens: Sequence[int] = probe_compute.DENSE_TOKENS
    overhead_tokens: Sequence[int] = probe_overhead.TOKENS
    overhead_rounds: int = 3
    block_bytes: int | None = None
    copy_bytes: Sequence[int] = (2**18, 2**21, 2**23, 2**25)

    @property
    def usual_shape(self) -> tuple[int, int]:
        """The expert that is computed while something else is measured: the one with most counts of tokens."""
        return max(self.experts, key=lambda shape: len(self.experts[shape]))


def measure_machine(
    disk: Path,
    device: Device,
    threads: int | None = None,
    extent: Extent | None = None,
    on_step: Callable[[str], object] = lambda step: None,
) -> MachineProfile:
    """Measures the disk that `disk` is on, the CPU with `threads` threads (default: torch's; at most one a core),
    and `device` if it is not the CPU.

    `on_step` is told what is measured next. Side effects: a temporary file on the disk, deleted at the end, and memory
    of a few times the processor's cache. Raises DiskSpaceError, ProfileError and TransferError.
    """
    extent = extent or Extent()
    threads = at_most_cores(threads) or torch.get_num_threads()
    cpu = CpuDevice()
    on_step("preparing memory")
    block = probe_compute.weight_block(cpu, extent.block_bytes)
    probe = ComputeProbe(cpu, threads, block)
    with ExitStack() as stack:
        on_step("writing a file to read")
        disk_probe = stack.enter_context(open_probe(disk, extent.file_bytes, extent.record_bytes))
        on_step("reading from disk")
        disk_profile = disk_probe.measure(extent.disk_blocks)
        on_step("computing while reading")
        contention = _contention(disk_probe, probe, extent)
    on_step("reading and copying memory")
    host_read = probe_memory.host_read_bytes_per_s(block, threads)
    host_copy = probe_memory.host_copy_bytes_per_s(max(extent.copy_bytes))
    packing = {name: probe.packing_bytes_per_s(name, extent.usual_shape) for name in extent.formats}
    compute = {Tier.CPU: _compute(probe, extent, contention, on_step)}
    link = None
    if device.is_accelerator:
        on_step(f"copying to {device.name}")
        link = link_profile(device, extent, block)
        # An accelerator computes with cores and memory of its own: reading from disk leaves it alone.
        if isinstance(device, EmulatedDevice):
            own = ComputeProbe(device, 1, block)
        else:
            own = ComputeProbe(device, threads, probe_compute.weight_block(device, extent.block_bytes))
        compute[device.tier] = _compute(own, extent, (1.0, 1.0), on_step)
        if isinstance(device, EmulatedDevice) and threads > 1:
            # Beside it the CPU has a core like the accelerator's.
            ours, theirs = compute[Tier.CPU], compute[device.tier]
            beside = tuple(curve for curve in theirs.experts if curve.threads < threads)
            compute[Tier.CPU] = replace(ours, experts=ours.experts + beside)
    return MachineProfile(
        disk=disk_profile,
        host_read_bytes_per_s=host_read,
        host_copy_bytes_per_s=host_copy,
        packing_bytes_per_s={name: rate for name, rate in packing.items() if rate is not None},
        cpu_start_s=probe_memory.hand_over_s(device),
        link=link,
        link_stated_bytes_per_s=device.link_bytes_per_s if isinstance(device, EmulatedDevice) else None,
        compute=compute,
        about=_about(disk, device),
    )


def link_profile(device: Device, extent: Extent | None = None, block: torch.Tensor | None = None) -> LinkProfile:
    """Copies to an accelerator, alone and while a thread of the CPU computes experts. Raises ProfileError."""
    extent = extent or Extent()
    cpu = CpuDevice()
    block = probe_compute.weight_block(cpu, extent.block_bytes) if block is None else block
    compute = ComputeProbe(cpu, 1, block).expert_call(extent.formats[0], extent.usual_shape)
    with torch_threads(1):
        return probe_memory.measure_link(device, extent.copy_bytes, partial(compute, 1))


def busy_cores() -> float | None:
    """How many cores were busy or wanted over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _contention(probe: DiskProbe, compute: ComputeProbe, extent: Extent) -> tuple[float, float]:
    """How computing on the CPU and reading slow each other down: (computing's factor, reading's factor)."""
    record_bytes = min(probe.record_bytes, key=lambda nbytes: abs(nbytes - _CONTENTION_RECORD_BYTES))
    with torch_threads(compute.threads):
        return slowdowns(probe, partial(compute.expert_call(extent.formats[0], extent.usual_shape), 1), record_bytes)


def _compute(
    probe: ComputeProbe, extent: Extent, contention: tuple[float, float], on_step: Callable[[str], object]
) -> ComputeProfile:
    device = probe.device
    experts = []
    for format in extent.formats:
        on_step(f"computing {format} experts on {device.name}")
        experts += [probe.expert(format, shape, tokens) for shape, tokens in extent.experts.items()]
    on_step(f"computing dense layers on {device.name}")
    dense = [probe.dense(format, extent.dense_shape, extent.dense_tokens) for format in extent.dense_formats]
    if probe.threads > 1 and not device.is_accelerator:  # as models with small experts do
        alone = ComputeProbe(device, 1, probe.block)
        dense += [alone.dense(format, extent.dense_shape, extent.dense_tokens) for format in extent.dense_formats]
    on_step(f"running tiny models on {device.name}")
    overhead = measure_overhead(device, extent.overhead_tokens, extent.overhead_rounds)
    return ComputeProfile(
        device=device.name,
        threads=probe.threads,
        experts=tuple(experts),
        dense=tuple(dense),
        layer_overhead=overhead.layer,
        expert_overhead_s=overhead.expert_s,
        pass_overhead_s=overhead.pass_s,
        reading_slowdown=contention[0],
        computing_slowdown=contention[1],
    )


def _about(disk: Path, device: Device) -> Mapping[str, str]:
    busy = busy_cores()
    return {
        "cpu": _cpu_name(),
        "cores": str(usable_cores()),
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
