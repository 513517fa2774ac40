"""For layers all of whose experts are on the accelerator: in which slot each of them is, as a tensor there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cache.residency import State
from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertLayer
from offload.device.base import Device
from offload.engine.runtime import ExpertRuntime


@dataclass(frozen=True)
class SlotTable:
    """`slots` int32 [experts] on the device: where each expert is in `block`, uint8, in slots of equal size."""

    slots: torch.Tensor
    block: torch.Tensor


@dataclass
class _Known:
    """What was found after so many changes to what lies where."""

    changes: int
    slots: list[int]
    table: SlotTable | None


class ResidentLayers:
    """Knows the tables of whole layers, and makes them anew when what lies where has changed.

    A table is good for what the device is given next: what gives up one of these slots later waits for that.
    """

    def __init__(self, runtime: ExpertRuntime, device: Device, slot_bytes: int) -> None:
        self._runtime, self._device, self._slot_bytes = runtime, device, slot_bytes
        self._known: dict[int, _Known] = {}
        self._keys: dict[int, list[ExpertKey]] = {}
        self._blocks: dict[int, torch.Tensor] = {}

    def table(self, layer: ExpertLayer) -> SlotTable | None:
        """Of all experts of a layer; None if one is not on the device. Waits for nothing."""
        engine = self._runtime.engine
        known = self._known.get(layer.index)
        if known is None or known.changes != engine.changes:
            known = self._known[layer.index] = self._find(layer, known)
        return known.table

    def place(self, view: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The block that `view` lies in, and in which of its slots."""
        storage = view.untyped_storage()
        block = self._blocks.get(storage.data_ptr())
        if block is None:
            block = torch.empty(0, dtype=torch.uint8, device=view.device).set_(storage)
            self._blocks[storage.data_ptr()] = block
        return block, int(view.storage_offset()) * view.dtype.itemsize // self._slot_bytes

    def close(self) -> None:
        """Forget every block, so that the slots' memory can be given back."""
        self._known.clear()
        self._blocks.clear()

    def _find(self, layer: ExpertLayer, before: _Known | None) -> _Known:
        engine, cache = self._runtime.engine, self._runtime.manager.computing
        keys = self._keys.get(layer.index)
        if keys is None:
            keys = self._keys[layer.index] = [ExpertKey(layer.index, expert) for expert in range(layer.num_experts)]
        if any(cache.state(key) is not State.RESIDENT for key in keys):
            return _Known(engine.changes, [], None)
        places = [self.place(engine.slot(cache.tier, key)) for key in keys]
        slots = [slot for _, slot in places]
        if before is not None and before.slots == slots:
            return _Known(engine.changes, slots, before.table)
        on_device = self._device.send(torch.tensor(slots, dtype=torch.int32))
        return _Known(engine.changes, slots, SlotTable(on_device, places[0][0]))
