"""A machine profile of round numbers, for tests that price things."""

from __future__ import annotations

from collections.abc import Mapping

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
)

MB = 10**6


def expert(weight_bytes: int, seconds: Mapping[int, float], format: str = "bf16") -> ProductCurve:
    """An expert's times by tokens."""
    return ProductCurve(format, (64, 32), weight_bytes, 2, Curve(tuple(seconds), tuple(seconds.values())))


def machine(with_accelerator: bool = True) -> MachineProfile:
    """A disk of 1 GB/s (0.1 ms more when idle), a link of 2 GB/s (and 1 ms), a CPU that reads 10 GB/s of weights."""
    cpu = ComputeProfile(
        device="cpu",
        threads=2,
        experts=(
            expert(10 * MB, {1: 1e-3, 4: 1e-3, 512: 64e-3}),
            expert(2 * MB, {1: 0.2e-3, 4: 0.2e-3, 512: 12.8e-3}),
            expert(20 * MB, {1: 4e-3, 512: 128e-3}, "fp32"),
        ),
        dense=(expert(10 * MB, {1: 1e-3, 512: 32e-3}), expert(20 * MB, {1: 2e-3}, "fp32")),
        layer_overhead=Curve((1, 512), (100e-6, 2e-3)),
        expert_overhead_s=10e-6,
        pass_overhead_s=500e-6,
        reading_slowdown=1.5,
        computing_slowdown=1.25,
    )
    gpu = ComputeProfile(
        device="emulated",
        threads=1,
        experts=(expert(10 * MB, {1: 0.1e-3, 512: 1e-3}),),
        dense=(expert(10 * MB, {1: 0.1e-3, 512: 0.2e-3}),),
        layer_overhead=Curve((1,), (50e-6,)),
        expert_overhead_s=20e-6,
        pass_overhead_s=300e-6,
        reading_slowdown=1.0,
        computing_slowdown=1.0,
    )
    return MachineProfile(
        disk=DiskProfile(
            2,
            Curve((MB, 10 * MB), (1.1e-3, 10.1e-3)),
            Curve((MB, 10 * MB), (1e-3, 10e-3)),
            (BlockReads(MB, 1, 0.5e9), BlockReads(MB, 2, 1e9)),
        ),
        host_read_bytes_per_s=10e9,
        host_copy_bytes_per_s=5e9,
        packing_bytes_per_s={"nf4": 1e9},
        cpu_start_s=50e-6,
        link=LinkProfile(CopyTime(1e-3, 2e9), CopyTime(1e-3, 1e9), CopyTime(2e-3, 1e9), CopyTime(2e-3, 0.5e9))
        if with_accelerator
        else None,
        link_stated_bytes_per_s=2e9 if with_accelerator else None,
        compute={Tier.CPU: cpu, Tier.GPU: gpu} if with_accelerator else {Tier.CPU: cpu},
        about={"cpu": "a test's"},
    )
