"""Measures this machine: disk, memory, link, processor, and the runtime's own overhead, with the runtime's own parts.

Takes less than a minute on any machine: on a slow one fewer things are measured, and the rest is estimated. The times
of a busy machine are those of a busy machine, which is noticed and stored with them.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from cache.errors import ProfileError
from cache.types import Tier
from offload.costs.machine import ComputeProfile, DiskProfile, LinkProfile, MachineProfile
from offload.device.base import CpuDevice, Device
from offload.device.emulated import EmulatedDevice
from offload.machine import memory
from offload.machine.budget import Budget, Clock
from offload.machine.busy import Watch, differs
from offload.machine.compute import ComputeProbe, weight_block
from offload.machine.disk import BURST, DiskProbe, open_probe, slowdowns
from offload.machine.extent import Extent
from offload.machine.threads import torch_threads
from offload.machine.tier import TierProbe
from offload.system.cores import at_most_cores, usable_cores

LIMIT_S = 38.0

_FILE, _DISK, _MEMORY, _LINK, _OVERHEADS, _PRODUCTS = 0.1, 0.25, 0.3, 0.35, 0.6, 1.0  # when a part ends
_LEAST_PRODUCTS_S = 4.0
_LEAST_COUNTS = 2  # of tokens, for what is kept when measuring is stopped: one says nothing of prompts
_CONTENTION_RECORD_BYTES = 8 * 2**20
_BURST_S = 0.5


class Stopped(KeyboardInterrupt):
    """Ctrl-C while a machine was measured: `step` says while doing what, `profile` has what was measured until then,
    where that is enough to price a pass by."""

    def __init__(self, step: str, profile: MachineProfile | None) -> None:
        super().__init__(step)
        self.step = step
        self.profile = profile


def measure_machine(
    disk: Path,
    device: Device,
    threads: int | None = None,
    extent: Extent | None = None,
    on_step: Callable[[str], object] = lambda step: None,
    *,
    limit_s: float = LIMIT_S,
    clock: Clock = time.perf_counter,
) -> MachineProfile:
    """Measures the disk that `disk` is on, the CPU with `threads` threads (default: torch's; at most one a core),
    and `device` if it is not the CPU, in about `limit_s` at most.

    `on_step` is told what is measured next. Side effects: a temporary file on the disk, deleted at the end, and memory
    of a few times the processor's cache. Raises DiskSpaceError, ProfileError, TransferError, and Stopped on Ctrl-C.
    """
    budget = Budget(limit_s, clock)
    on_step(step := "preparing memory")
    machine = None
    try:
        machine = _Machine(disk, device, at_most_cores(threads) or torch.get_num_threads(), extent or Extent(), budget)
        for step, measure in machine.parts():
            on_step(step)
            measure()
    except KeyboardInterrupt:
        raise Stopped(step, None if machine is None else machine.profile(_LEAST_COUNTS)) from None
    found = machine.profile(1)
    if found is None:
        raise ProfileError("this machine is too slow or too busy to be measured: try again when it is idle")
    return found


class _Machine:
    """What was found so far; None is what was not measured yet."""

    def __init__(self, disk: Path, device: Device, threads: int, extent: Extent, budget: Budget) -> None:
        self._folder, self._device, self._threads, self._extent, self._budget = disk, device, threads, extent, budget
        self._watch = Watch()
        self._drift: str | None = None
        self._block = weight_block(CpuDevice(), extent.block_bytes)
        self._probe = ComputeProbe(CpuDevice(), threads, self._block)
        self._tiers = {Tier.CPU: TierProbe(self._probe, extent)}
        if isinstance(device, EmulatedDevice):
            self._tiers[device.tier] = TierProbe(ComputeProbe(device, 1, self._block), extent)
        elif device.is_accelerator:
            theirs = weight_block(device, extent.block_bytes)
            self._tiers[device.tier] = TierProbe(ComputeProbe(device, threads, theirs), extent)
        self._disk: tuple[DiskProfile, tuple[float, float]] | None = None
        self._memory: tuple[float, float, dict[str, float], float] | None = None
        self._link: LinkProfile | None = None

    def parts(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """What is measured in turn: what every price needs comes first, what can be estimated last."""
        before_s = self._tiers[Tier.CPU].usual_s(self._budget)
        yield "reading from disk", self._measure_disk
        yield "reading and copying memory", self._measure_memory
        if self._device.is_accelerator:
            yield f"copying to {self._device.name}", self._measure_link
        for share, tier in self._shares(_LINK, _OVERHEADS):
            overheads = partial(tier.measure_overhead, self._budget.until(share))
            yield f"running tiny models on {tier.device.name}", overheads
        for share, tier in self._shares(_OVERHEADS, _PRODUCTS):
            products = partial(tier.measure_products, self._budget.until(share, _LEAST_PRODUCTS_S))
            yield f"computing experts and dense layers on {tier.device.name}", products
        self._drift = differs(before_s, self._tiers[Tier.CPU].usual_s(self._budget))

    def _shares(self, start: float, end: float) -> Iterator[tuple[float, TierProbe]]:
        """The tiers, each with when its turn ends: all have as long."""
        for i, tier in enumerate(self._tiers.values(), 1):
            yield start + (end - start) * i / len(self._tiers), tier

    def _measure_disk(self) -> None:
        extent, budget = self._extent, self._budget
        with open_probe(self._folder, extent.file_bytes, extent.record_bytes, budget.until(_FILE)) as probe:
            disk = probe.measure(budget.until(_DISK), extent.disk_blocks)
            self._disk = disk, self._contention(probe, disk, budget.until(_DISK))

    def _contention(self, probe: DiskProbe, disk: DiskProfile, budget: Budget) -> tuple[float, float]:
        """How computing on the CPU and reading slow each other down: (computing's factor, reading's factor)."""
        read = zip(disk.streamed.at, disk.streamed.seconds, strict=True)
        usual = [n for n, seconds in read if n <= _CONTENTION_RECORD_BYTES and BURST * seconds <= _BURST_S]
        compute = partial(self._probe.expert_call(self._extent.formats[0], self._extent.usual_shape), 1)
        with torch_threads(self._threads):
            return slowdowns(probe, compute, max(usual, default=disk.streamed.at[0]), budget)

    def _measure_memory(self) -> None:
        extent, budget = self._extent, self._budget.until(_MEMORY)
        read = memory.host_read_bytes_per_s(self._block, self._threads, budget)
        copy = memory.host_copy_bytes_per_s(max(extent.copy_bytes), budget)
        rates = {name: self._probe.packing_bytes_per_s(name, extent.usual_shape, budget) for name in extent.formats}
        packing = {name: rate for name, rate in rates.items() if rate is not None}
        self._memory = read, copy, packing, memory.hand_over_s(self._device, budget)

    def _measure_link(self) -> None:
        """Copies alone, and while a thread of the CPU computes experts."""
        extent, budget = self._extent, self._budget.until(_LINK)
        compute = partial(self._probe.expert_call(extent.formats[0], extent.usual_shape), 1)
        with torch_threads(1):
            self._link = memory.measure_link(self._device, extent.copy_bytes, compute, budget)

    def profile(self, least: int) -> MachineProfile | None:
        """What was measured so far of products known by at least so many counts of tokens, without an accelerator that
        was not; None if the rest is not enough."""
        if self._disk is None or self._memory is None:
            return None
        disk, contention = self._disk
        tiers = {Tier.CPU: self._tiers[Tier.CPU].profile(least, contention)}
        if self._link is not None:
            tiers[self._device.tier] = self._tiers[self._device.tier].profile(least)
        compute = {tier: found for tier, found in tiers.items() if found is not None}
        if Tier.CPU not in compute:
            return None
        emulated = self._device if isinstance(self._device, EmulatedDevice) and len(compute) > 1 else None
        if emulated is not None:
            compute[Tier.CPU] = _beside(compute[Tier.CPU], compute[emulated.tier])
        read, copy, packing, start_s = self._memory
        return MachineProfile(
            disk=disk,
            host_read_bytes_per_s=read,
            host_copy_bytes_per_s=copy,
            packing_bytes_per_s=packing,
            cpu_start_s=start_s,
            link=self._link if len(compute) > 1 else None,
            link_stated_bytes_per_s=None if emulated is None else emulated.link_bytes_per_s,
            compute=compute,
            about=self._about(),
            busy=self._watch.said(self._threads) or self._drift,
        )

    def _about(self) -> Mapping[str, str]:
        others = self._watch.others()
        return {
            "cpu": _cpu_name(),
            "cores": str(usable_cores()),
            "memory_bytes": str(psutil.virtual_memory().total),
            "disk": str(self._folder),
            "device": self._device.name,
            "busy_cores": "unknown" if others is None else f"{others:.1f}",
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }


def _beside(cpu: ComputeProfile, emulated: ComputeProfile) -> ComputeProfile:
    """The CPU with what it does on one core as well: it has no more beside an emulated accelerator, which is a core."""
    alone = tuple(curve for curve in emulated.experts if curve.threads < cpu.threads)
    return replace(cpu, experts=cpu.experts + alone)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
