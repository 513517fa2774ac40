"""What a running model has counted, as one snapshot."""

from __future__ import annotations

from copy import deepcopy

from cache.types import Tier
from offload.assembly.assemble import Assembly
from offload.stats import Stats, TierReport
from offload.system import memory


def snapshot(assembly: Assembly) -> Stats:
    """Everything counted since loading, or since it was reset; later passes do not change it."""
    runtime, plan, device = assembly.runtime, assembly.prepared.plan, assembly.device
    manager, prefetcher = runtime.manager, runtime.manager.prefetcher
    return Stats(
        tiers={
            cache.tier: TierReport(
                deepcopy(manager.stats[cache.tier]),
                sum(stack[i].capacity_bytes for stack in manager.stacks.by_slice),
                sum(stack[i].peak_bytes for stack in manager.stacks.by_slice),
            )
            for i, cache in enumerate(manager.caches)
        },
        computing=plan.computing_tier,
        bytes_from_disk=manager.bytes_from_disk,
        bytes_over_link=manager.stats[plan.computing_tier].bytes_in if device.is_accelerator else 0,
        stall_s=runtime.stall_s,
        peak_rss_bytes=memory.peak_resident_bytes(),
        peak_gpu_bytes=_peak_gpu_bytes(assembly),
        cpu_mem_bytes=plan.cpu_mem_bytes,
        gpu_mem_bytes=plan.gpu_mem_bytes,
        speed=deepcopy(assembly.passes.speed),
        precision_uses=_precision_uses(assembly),
        dropped_share=manager.serving.dropped_share,
        prefetch=None if prefetcher is None or not prefetcher.predicts else "on" if prefetcher.active else "off",
        prefetch_gain=None if prefetcher is None or prefetcher.switch is None else prefetcher.switch.gain,
    )


def _precision_uses(assembly: Assembly) -> dict[str, int]:
    serving = assembly.runtime.manager.serving
    names = [precision.name for precision in assembly.store.precisions]
    others = {"skipped": serving.skipped, "replaced": serving.replaced}
    return dict(zip(names, serving.uses, strict=True)) | {name: n for name, n in others.items() if n}


def _peak_gpu_bytes(assembly: Assembly) -> int | None:
    device, plan = assembly.device, assembly.prepared.plan
    if not device.is_accelerator:
        return None
    measured = device.peak_bytes()
    if measured is not None:
        return measured
    # The emulated accelerator's memory is host memory: what was set aside for it is what it can have used.
    return sum(nbytes for _, tier, nbytes, _ in plan.rows() if tier == Tier.GPU.value)
