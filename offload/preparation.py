"""From what the user typed to a plan: configuration, skeleton, expert map, footprint, budgets. Reads headers only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cache.errors import UnsupportedFamilyError
from offload import memory
from offload.checkpoint import map_experts
from offload.checkpoint_store import CheckpointStore
from offload.device import Device, make_device
from offload.footprint import weigh
from offload.hub import Source
from offload.layout import TORCH_DTYPES, ExpertMap
from offload.placement import DEFAULT_SHARE, Budgets, Needs, Plan, choose_context, place
from offload.sizes import parse_bytes
from offload.skeleton import build_skeleton, read_config, resolve_dtype
from offload.transfer import READERS


@dataclass(frozen=True)
class Prepared:
    """Everything known about a model before a weight is read."""

    source: Source
    config: Any
    dtype: torch.dtype
    device: Device
    skeleton: Any
    experts: ExpertMap
    plan: Plan
    trust_remote_code: bool

    def on_disk(self, source: Source, experts: ExpertMap) -> Prepared:
        """The same, once the weights are on this disk."""
        return replace(self, source=source, experts=experts)


def prepare(
    source: Source,
    *,
    gpu_mem: str | int | None = None,
    cpu_mem: str | int | None = None,
    expert_cache: str | int | None = None,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    link: str | float | None = None,
    trust_remote_code: bool = False,
) -> Prepared:
    """Plan `source` under the given budgets. Raises every error that bad input can cause before loading."""
    sizes = {
        "--gpu-mem": None if gpu_mem is None else parse_bytes(gpu_mem, "--gpu-mem"),
        "--cpu-mem": None if cpu_mem is None else parse_bytes(cpu_mem, "--cpu-mem"),
        "--expert-cache": None if expert_cache is None else parse_bytes(expert_cache, "--expert-cache"),
    }
    config = read_config(source.folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        method = _quantization_method(config.quantization_config)
        raise UnsupportedFamilyError(
            f"{source.name} is stored in a quantised format ({method}), which is not read yet: "
            "use a bf16 checkpoint of it"
        )
    on_disk = (TORCH_DTYPES.get(info.dtype) for info in source.index.values())
    weights = next((kind for kind in on_disk if kind is not None and kind.is_floating_point), torch.float32)
    chosen = resolve_dtype(config, dtype, weights)
    skeleton = build_skeleton(config, chosen, trust_remote_code=trust_remote_code)
    experts = map_experts(skeleton, source.index)
    max_context = getattr(config.get_text_config(), "max_position_embeddings", None)
    tokens = choose_context(context, max_context)
    place_on = make_device(device, link)
    try:
        weight = weigh(skeleton, tokens)
        needs = Needs(
            model=source.name,
            context=tokens,
            max_context=max_context,
            dense_bytes=weight.dense_bytes,
            kv_bytes=weight.kv_bytes,
            workspace_bytes=weight.workspace_bytes,
            layers=len(experts.layers),
            experts=experts.total_experts,
            slot_bytes=experts.slot_bytes,
            expert_bytes=experts.expert_bytes,
            reader_bytes=CheckpointStore(experts).reader_bytes,
            readers=READERS,
            process_bytes=memory.resident_bytes(),
        )
        budgets, notes = _budgets(place_on, sizes)
        plan = place(needs, budgets, device=place_on.name, dtype=str(chosen).removeprefix("torch."))
    except BaseException:
        place_on.close()
        raise
    plan = replace(plan, notes=notes, download_bytes=source.download_bytes)
    return Prepared(source, config, chosen, place_on, skeleton, experts, plan, trust_remote_code)


def _budgets(device: Device, sizes: dict[str, int | None]) -> tuple[Budgets, tuple[str, ...]]:
    cpu, gpu = sizes["--cpu-mem"], sizes["--gpu-mem"]
    notes: tuple[str, ...] = ()
    if cpu is None:
        cpu = memory.resident_bytes() + int(DEFAULT_SHARE * memory.available_bytes())
        if device.name == "emulated":
            cpu -= min(cpu // 2, gpu or int(DEFAULT_SHARE * (device.memory_bytes() or 0)))
    if device.is_accelerator and gpu is None:
        gpu = int(DEFAULT_SHARE * (device.memory_bytes() or 0))
    elif not device.is_accelerator and gpu is not None:
        notes = ("--gpu-mem has no effect: there is no accelerator here, so the CPU computes",)
        gpu = None
    return Budgets(cpu, gpu, sizes["--expert-cache"]), notes


def _quantization_method(quantization: Any) -> str:
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "unknown"))
    return str(getattr(quantization, "quant_method", "unknown"))
