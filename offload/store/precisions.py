"""The store that serves what `--experts` names: from the checkpoint, from converted records, or from both."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import torch

from cache.errors import FormatError
from offload.checkpoint.layout import ExpertMap
from offload.costs.precision import title
from offload.formats import Format
from offload.formats.precision import form_of, ready_name, record_name
from offload.store.base import ExpertSlice, ExpertStore, Precision, Weights
from offload.store.index import StoreIndex
from offload.store.plain import CheckpointSlice, own_precision
from offload.store.record import Place, layouts_of, places_views, ready_layouts
from offload.store.records import RecordSlice
from offload.system.seen import SeenFile


def from_checkpoint(experts: ExpertMap, names: Sequence[str], index: StoreIndex | None) -> list[str]:
    """Those of `names` that need no records: the model's own precision, unless it was converted."""
    own = own_precision(experts)
    return [name for name in names if name == "auto" or (name == own and (index is None or own not in index.formats))]


def to_convert(experts: ExpertMap, names: Sequence[str], index: StoreIndex | None, device_type: str) -> list[str]:
    """The records that `names` take where experts are computed on `device_type`."""
    served = from_checkpoint(experts, names, index)
    recorded = [name for name in names if name not in served]
    return list(dict.fromkeys(records_of(experts, recorded, index, device_type).values()))


def records_of(experts: ExpertMap, names: Sequence[str], index: StoreIndex | None, device_type: str) -> dict[str, str]:
    """By precision, the records that serve it: on a CPU those that lie as it computes with them, if there are such.

    Where the others are there already, they serve. Several levels of one format share records, which no level's kernel
    can order.
    """
    stored = () if index is None else index.formats
    plain = {name: record_name(name) for name in names}
    result = {}
    for name, record in plain.items():
        ready = ready_name(name)
        alone = list(plain.values()).count(record) == 1
        served = record in stored and ready not in stored
        if ready is None or device_type != "cpu" or not alone or served or ready_layouts(experts, name) is None:
            result[name] = record
        else:
            result[name] = ready
    return result


class PrecisionStore(ExpertStore):
    """Experts at every precision of `names`, best first.

    Without a `folder` nothing can be read, but everything can be planned. `device_type` is where experts are computed.
    """

    def __init__(
        self,
        experts: ExpertMap,
        names: Sequence[str],
        device_type: str = "cpu",
        folder: Path | None = None,
        index: StoreIndex | None = None,
        direct: bool = True,
    ) -> None:
        self._experts = experts
        self._folder, self._index = folder, index
        self._files: dict[str, SeenFile] = {}
        self._direct, self._device_type = direct, device_type
        slices: list[ExpertSlice] = []
        precisions: dict[str, Precision] = {}
        served = from_checkpoint(experts, names, index)
        records = records_of(experts, [name for name in names if name not in served], index, device_type)
        nested = [name for name, record in records.items() if record == "nested"]
        for name in names:  # the best precision's slices come first: what is fetched ahead is the first one
            if name in served:
                precisions[name] = Precision(own_precision(experts), (len(slices),))
                slices.append(CheckpointSlice(experts, direct))
            elif name not in nested:
                precisions[name] = Precision(title(name), (len(slices),))
                level = form_of(name)
                whole = name if isinstance(level, Format) else None
                slices.append(self._slice(title(name), records[name], (0, 1), whole))
            elif name == nested[0]:
                begun: tuple[int, ...] = ()  # slices of the nested format, lowest first
                first = 0
                for level_name in reversed(nested):
                    last = layouts_of(experts, "nested")[0].segments_of(level_name)
                    begun = (*begun, len(slices))
                    # The lowest level is whole, and may be packed as its format wants; the others are planes to add.
                    whole = None if first else level_name
                    slices.append(self._slice(title(level_name), "nested", (first, last), whole))
                    precisions[level_name] = Precision(title(level_name), begun)
                    first = last
        self._levels = list(names)
        self.precisions = [precisions[name] for name in names]
        self.slices = slices
        if len({precision.name for precision in self.precisions}) < len(names):
            raise FormatError(f"--experts {','.join(names)}: the model's own precision is named twice")

    @property
    def scratch_bytes(self) -> int:
        """What multiplying by a quantised matrix may take besides the result: for many tokens it is turned into numbers
        first, some of them twice."""
        shapes = [
            (shape, max(parameter.dtype.itemsize for parameter in layer.parameters))
            for each in self.slices
            if isinstance(each, RecordSlice)
            for layer, layout in zip(self._experts.layers, each.layouts, strict=True)
            for _, shape in layout.matrices
        ]
        return max((shape.n * shape.k * itemsize * 3 // 2 for shape, itemsize in shapes), default=0)

    @property
    def packs(self) -> bool:
        """Whether what is read must be put in order before it is computed with."""
        return any(isinstance(each, RecordSlice) and each.reader_bytes for each in self.slices)

    def layout(self, layer: int) -> Hashable:
        """How slots of every slice look."""
        return tuple(
            each.layouts[layer] if isinstance(each, RecordSlice) else self._experts.layers[layer].layout
            for each in self.slices
        )

    def weights(self, layer: int, precision: int, slots: Sequence[torch.Tensor]) -> Weights:
        """The expert's parameters over its slots."""
        indices = self.precisions[precision].slices
        fields: list[tuple[Place, torch.Tensor]] = []
        layout = None
        for index, slot in zip(indices, slots, strict=True):
            each = self.slices[index]
            if not isinstance(each, RecordSlice):
                return self._experts.layers[layer].views(slot)
            layout = each.layouts[layer]
            packed = each.packed[layer]
            if packed is not None:
                fields += places_views(packed, slot)
            else:
                fields += layout.views(slot, each.first, each.last)
        if layout is None:
            raise ValueError("a precision without slices")
        return layout.weights(fields, self._levels[precision])

    def _slice(self, name: str, record: str, segments: tuple[int, int], level: str | None) -> RecordSlice:
        entry = None if self._index is None else self._index.formats.get(record)
        layouts, file = layouts_of(self._experts, record), None
        if self._folder is not None and entry is not None:
            # All slices of a file share what is known of it: one that mends a record changes it for all.
            path = str(self._folder / entry.file)
            if path not in self._files:
                self._files[path] = SeenFile(path)
                self._files[path].sample()
            file = self._files[path]
        return RecordSlice(name, file, entry, self._experts, layouts, segments, level, self._device_type, self._direct)
