"""A layer's experts computed together on an accelerator, found by the slots they are in, instead of one by one.

Up to MOST_TOKENS tokens, the experts that are there when a layer begins take two launches, and each that lands later
two more. Where all experts of a layer are on the accelerator nobody on the host has to know which are used: their slots
are looked up there, and the host waits for nothing. What was routed reaches the manager afterwards, in order: before
the next layer that it decides about, or at the end of the pass.

What comes out is the same, bit for bit, whichever of these ways a layer takes.
"""

from __future__ import annotations

import importlib.util
from contextlib import closing
from typing import Any

import torch

from cache.types import Phase
from offload.checkpoint.layout import ExpertLayer
from offload.device.base import Device
from offload.engine.fused.deferred import DeferredEvents, Routing
from offload.engine.fused.layer import FusedLayer, Kernels
from offload.engine.fused.places import ExpertPlaces
from offload.engine.fused.resident import ResidentLayers
from offload.engine.host import Job
from offload.engine.outputs import compute_expert
from offload.engine.runtime import ExpertRuntime
from offload.layers.autocast import autocasts
from offload.store.base import ExpertStore, Weights
from offload.store.record import StoredMatrix

MOST_TOKENS = 32
"""Of more, each expert's own products are the faster way. Not measured."""

_ABSENT = -1  # in place of a slot


class FusedExperts:
    """What `ExpertRuntime.fused` may be: asked for every layer before experts are computed one by one.

    For experts at one precision, in one slice. Called by the computing thread.
    """

    def __init__(self, runtime: ExpertRuntime, device: Device, store: ExpertStore, kernels: Kernels) -> None:
        self._runtime, self._device, self._store, self._kernels = runtime, device, store, kernels
        self._places: dict[int, ExpertPlaces | None] = {}
        self._resident = ResidentLayers(runtime, device, store.slot_bytes[0])
        self._events = DeferredEvents(runtime, device)

    def __call__(
        self,
        layer: ExpertLayer,
        module: Any,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor | None:
        """hidden [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H]; None where it is not for this to compute.

        Raises TransferError when an expert cannot be read, and what a policy raises.
        """
        places = self._places_of(layer, module)
        if places is None or len(hidden) > MOST_TOKENS or self._runtime.observer is not None or autocasts(hidden):
            self.flush()
            return None
        table = self._resident.table(layer) if self._may_defer() else None
        call = FusedLayer(self._kernels, places, hidden, top_k_weights)
        if table is not None:
            out = call.all(table.slots[top_k_index], table.block)
            self._events.add(layer, top_k_index, top_k_weights)
            return out
        routing = Routing.of(top_k_index, top_k_weights)
        self.flush()
        self._as_they_come(layer, module, call, hidden, routing, top_k_index.shape)
        return call.out

    def flush(self) -> None:
        """Let the manager have what it has not heard of: before it decides about anything else, and after a pass."""
        self._events.tell()

    def forget(self) -> None:
        """The manager starts over: it need not hear of what was before."""
        self._events.drop()

    def close(self) -> None:
        """Forget the slots, so that their memory can be given back."""
        self._resident.close()

    def _may_defer(self) -> bool:
        """Whether an event that finds everything resident makes nothing move."""
        manager, phase = self._runtime.manager, self._runtime.phase
        prefetcher = manager.prefetcher
        if manager.split is not None or manager.computing.policy.exchanges:
            return False  # the CPU may be given what is resident, and something may come that nobody waits for
        return prefetcher is None or not (prefetcher.listens or prefetcher.flights or phase is Phase.PREFILL)

    def _places_of(self, layer: ExpertLayer, module: Any) -> ExpertPlaces | None:
        if layer.index not in self._places:
            self._places[layer.index] = ExpertPlaces.of(
                module, self._store.slot_bytes[0], lambda slot: self._store.weights(layer.index, 0, [slot])
            )
        return self._places[layer.index]

    def _as_they_come(
        self,
        layer: ExpertLayer,
        module: Any,
        call: FusedLayer,
        hidden: torch.Tensor,
        routing: Routing,
        shape: torch.Size,
    ) -> None:
        """What is resident first, all together; then each expert that lands; at last what the CPU computed."""
        runtime, left = self._runtime, set(routing.pairs)
        beside = _OnHost(module, hidden, routing, shape[1])
        block = hidden.new_empty(0, dtype=torch.uint8)

        def compute(slots: dict[int, int]) -> None:
            left.difference_update(slots)
            of_pairs = [_ABSENT] * shape.numel()
            for expert, slot in slots.items():
                for pair in routing.pairs[expert]:
                    of_pairs[pair] = slot
            on_device = self._device.send(torch.tensor(of_pairs, dtype=torch.int32).view(shape))
            if len(slots) == len(routing.pairs):
                call.all(on_device, block)
            else:
                call.some(on_device, block, last=not left)

        with closing(runtime.run(layer, *routing.event, beside.job, together=len(routing.pairs))) as available:
            for group in available:
                slots = {}
                for expert, weights in group:
                    block, slots[expert] = self._resident.place(_any_view(weights))
                compute(slots)
        for expert, outputs in beside.outputs.items():
            call.put(routing.pairs[expert], outputs.to(hidden.device))
            left.discard(expert)
        if beside.outputs:
            compute({})


class _OnHost:
    """What the CPU computes of a layer: `outputs` [M, H] by expert, not weighted."""

    def __init__(self, module: Any, hidden: torch.Tensor, routing: Routing, top_k: int) -> None:
        self.outputs: dict[int, torch.Tensor] = {}
        self._module, self._hidden, self._routing, self._top_k = module, hidden, routing, top_k
        self._on_host: torch.Tensor | None = None

    def job(self, expert: int, weights: Weights) -> Job:
        """The work on one expert, whose parameters are in host memory. The first one brings the tokens there."""
        if self._on_host is None:
            self._on_host = self._hidden.to("cpu")
        rows = self._on_host[[pair // self._top_k for pair in self._routing.pairs[expert]]]

        def compute() -> None:
            self.outputs[expert] = compute_expert(self._module, rows, weights)

        return compute


def make_fused(runtime: ExpertRuntime, device: Device, store: ExpertStore) -> FusedExperts | None:
    """For a CUDA GPU where Triton is installed, and experts at one precision in one slice; None elsewhere."""
    if device.torch_device.type != "cuda" or len(store.slices) > 1 or importlib.util.find_spec("triton") is None:
        return None
    from offload.engine.fused import kernels as grouped_triton

    return FusedExperts(runtime, device, store, grouped_triton)


def _any_view(weights: Weights) -> torch.Tensor:
    """A tensor in the slot of an expert with these parameters."""
    found = next(iter(weights.values()))
    if isinstance(found, StoredMatrix):
        return next(iter(found.fields.values()))
    assert isinstance(found, torch.Tensor)
    return found
