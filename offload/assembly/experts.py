"""The experts of a model: the store they are read from, the caches they are kept in, and the loop that decides."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.policy import EvictionPolicy
from cache.residency import ExpertCache
from cache.types import ExpertKey, Tier
from offload.checkpoint.layout import ExpertMap
from offload.decide.fallbacks.base import Sensitivity
from offload.decide.manager import Manager
from offload.decide.stacks import Stacks
from offload.engine.transfer import TransferEngine
from offload.layers.calibration import find_calibration
from offload.layers.router import gate_similarity
from offload.plan.prepare import Prepared
from offload.store.convert import convert
from offload.store.precisions import PrecisionStore, to_convert
from offload.system import memory
from offload.system.progress import progress_bar


def open_store(prepared: Prepared, progress: bool) -> PrecisionStore:
    """The store that serves the precisions asked for; what has to be converted for them is converted first."""
    experts, names = prepared.experts, prepared.precisions
    device_type = prepared.device.torch_device.type
    if names == ("auto",):
        return PrecisionStore(experts, names, device_type)
    folder, index = prepared.converted()
    missing = to_convert(experts, names, index, device_type)
    if missing:
        with progress_bar("converting experts", unit="bytes", show=progress) as bar:
            index = convert(
                folder,
                prepared.origin,
                experts,
                missing,
                memory_bytes=prepared.plan.cpu_mem_bytes - memory.resident_bytes(),
                bar=bar,
            )
    return PrecisionStore(experts, names, device_type, folder, index)


def make_manager(
    prepared: Prepared, store: PrecisionStore, caches: Sequence[Sequence[ExpertCache]], model: Any
) -> Manager:
    """The decision loop for what the user asked for. Raises PolicyError and TraceError."""
    fallback = prepared.fallback
    sensitivity = _sensitivity(model, prepared.experts)
    if fallback.needs_similarity:
        sensitivity = replace(sensitivity, similarity=gate_similarity(model, prepared.experts))
    fallback.learn(sensitivity)
    slices = [precision.slices for precision in store.precisions]
    supers = sensitivity.super_experts if fallback.lossy else ()
    return Manager(Stacks(caches, store.slot_bytes, slices), fallback=fallback, super_experts=supers)


def _sensitivity(model: Any, experts: ExpertMap) -> Sensitivity:
    """What a calibration of this model says of its experts; nothing if there is none."""
    found = find_calibration(model, experts)
    if found is None:
        return Sensitivity()
    importance = None
    if found.importance is not None:
        importance = {
            ExpertKey(layer.index, expert): float(found.importance[layer.index, expert])
            for layer in experts.layers
            for expert in range(layer.num_experts)
        }
    layers, unscaled = (_of_mean(each) for each in (found.sensitivity, found.unscaled_sensitivity))
    return Sensitivity(layers, importance, found.super_experts, unscaled=unscaled)


def _of_mean(measured: NDArray[np.float32] | None) -> list[float]:
    """By layer, in units of the mean; nothing if there is none."""
    values = [] if measured is None else measured.clip(min=0).tolist()
    mean = sum(values) / len(values) if values else 0.0
    return [value / mean for value in values] if mean else []


def load_lowest(
    store: PrecisionStore, experts: ExpertMap, manager: Manager, engine: TransferEngine, progress: bool
) -> None:
    """Fill host memory with every expert at the lowest precision. Raises TransferError."""
    (slice_,) = store.precisions[-1].slices
    source = store.slices[slice_]
    cache = manager.stacks.cache(Tier.CPU, slice_)
    with (
        closing(source.open()) as reader,
        progress_bar(f"loading all experts at {source.name}", source.expert_bytes, unit="bytes", show=progress) as bar,
    ):
        for layer in experts.layers:
            for key in (ExpertKey(layer.index, expert) for expert in range(layer.num_experts)):
                cache.reserve(key, source.slot_bytes)
                engine.load(key, slice_, reader)
                cache.commit(key)
                bar.advance(source.record_bytes(key))


def make_cache(tier: Tier, slot_bytes: int, policy: EvictionPolicy) -> ExpertCache:
    """An empty cache with whole slots for every lane of its policy."""
    return ExpertCache(tier, [slot_bytes * slots for slots in policy.lanes.slots.tolist()], policy)
