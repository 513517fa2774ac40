"""How one expert lies in a record of a converted store, and in a slot of memory.

A record is a row of segments, each a multiple of 4 KiB. The first holds what the lowest level of its format needs, and
everything that is no matrix; each further one what the next better level adds. So a level is a prefix of the record,
and read in one go.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from cache.errors import FormatError
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.checkpoint.parameter import align
from offload.checkpoint.skeleton import PROJECTIONS
from offload.formats import Field, Format
from offload.formats.precision import form_of, ready_name, ready_precision
from offload.store.base import Weights
from offload.store.files import BLOCK

RAW = "weight"  # the one field of a parameter that is kept as it is


@dataclass(frozen=True)
class Shape:
    """A matrix [n, k] with n outputs and k inputs; `transposed`: the model keeps it as [k, n]."""

    n: int
    k: int
    transposed: bool


@dataclass(frozen=True)
class Place:
    """Where one field of one parameter starts in its segment or slot."""

    parameter: str
    field: Field
    offset: int


Places = tuple[Place, ...]


@dataclass(frozen=True)
class RecordLayout:
    """The records of one layer's experts in `form`, or at a plain dtype.

    Hashable: layers with equal layouts have equal records.
    """

    form: Format | torch.dtype
    matrices: tuple[tuple[str, Shape], ...]
    segments: tuple[Places, ...]

    @classmethod
    def of(cls, layer: ExpertLayer, form: Format | torch.dtype) -> RecordLayout:
        """How the experts of `layer` are recorded. A Format quantises projections, and nothing else."""
        matrices: dict[str, Shape] = {}
        levels = 1
        if isinstance(form, Format):
            levels = len(form.levels)
            for parameter in layer.parameters:
                if parameter.name in PROJECTIONS and len(parameter.shape) == 2:
                    n, k = parameter.shape[::-1] if layer.is_transposed else parameter.shape
                    matrices[parameter.name] = Shape(n, k, layer.is_transposed)
        fields: list[list[tuple[str, Field]]] = [[] for _ in range(levels)]
        for parameter in layer.parameters:
            name = parameter.name
            if name in matrices and isinstance(form, Format):
                for level, added in enumerate(form.fields(matrices[name].n, matrices[name].k)):
                    fields[level] += [(name, field) for field in added]
            else:
                dtype = parameter.dtype if isinstance(form, Format) else form
                fields[0].append((name, Field(RAW, dtype, parameter.shape)))
        return cls(form, tuple(matrices.items()), tuple(_in_a_row(each) for each in fields))

    @cached_property
    def segment_bytes(self) -> tuple[int, ...]:
        """Of each segment."""
        return tuple(_end(places, BLOCK) for places in self.segments)

    @cached_property
    def record_bytes(self) -> int:
        """Of a whole record."""
        return sum(self.segment_bytes)

    @property
    def encoding_bytes(self) -> int:
        """Memory that records take while one is encoded."""
        return self.record_bytes

    def write(self, parameters: Mapping[str, torch.Tensor], record: torch.Tensor) -> None:
        """Encode an expert's `parameters` into `record` (uint8 [record_bytes])."""
        record.zero_()
        views: dict[str, dict[str, torch.Tensor]] = {}
        for place, tensor in self.views(record, 0, len(self.segments)):
            views.setdefault(place.parameter, {})[place.field.name] = tensor
        shapes = dict(self.matrices)
        for name, fields in views.items():
            weight = parameters[name]
            if name not in shapes or not isinstance(self.form, Format):
                fields[RAW].copy_(weight)
                continue
            for field, value in self.form.encode(weight.t() if shapes[name].transposed else weight).items():
                fields[field].copy_(value)

    def checksums(self, record: torch.Tensor) -> list[int]:
        """CRC-32 of each segment of `record` (uint8)."""
        result, at = [], 0
        for nbytes in self.segment_bytes:
            result.append(zlib.crc32(record[at : at + nbytes].numpy().data))
            at += nbytes
        return result

    def views(self, slot: torch.Tensor, first: int, last: int) -> list[tuple[Place, torch.Tensor]]:
        """Every field of segments first to last (exclusive) that lie one after the other in `slot`; no copy."""
        result, at = [], 0
        for segment in range(first, last):
            result += [(place, _view(slot, at + place.offset, place.field)) for place in self.segments[segment]]
            at += self.segment_bytes[segment]
        return result

    def packed(self, level: str, device_type: str) -> Places | None:
        """How an expert at `level` lies in a slot where it is computed, if not as a record."""
        if not isinstance(self.form, Format):
            return None
        fields: list[tuple[str, Field]] = []
        changed = False
        shapes = dict(self.matrices)
        raw = [(place.parameter, place.field) for place in self.segments[0] if place.parameter not in shapes]
        for name, shape in self.matrices:
            packed = self.form.packed(shape.n, shape.k, level, device_type)
            changed |= packed is not None
            fields += [(name, field) for field in packed or self.form.stored(shape.n, shape.k, level)]
        return _in_a_row([*raw, *fields]) if changed else None

    def pack(self, record: torch.Tensor, places: Places, slot: torch.Tensor, level: str, device_type: str) -> None:
        """Turn a record (uint8, the segments of `level`) into what `packed` describes, in `slot` (uint8)."""
        if not isinstance(self.form, Format):
            raise ValueError("nothing is packed at a plain dtype")
        stored: dict[str, dict[str, torch.Tensor]] = {}
        for place, tensor in self.views(record, 0, self.segments_of(level)):
            stored.setdefault(place.parameter, {})[place.field.name] = tensor
        out: dict[str, dict[str, torch.Tensor]] = {}
        for place in places:
            out.setdefault(place.parameter, {})[place.field.name] = _view(slot, place.offset, place.field)
        shapes = dict(self.matrices)
        for name, fields in out.items():
            shape = shapes.get(name)
            if shape is not None and self.form.packed(shape.n, shape.k, level, device_type) is not None:
                self.form.pack(stored[name], shape.n, shape.k, level, fields)
            else:
                for field, tensor in fields.items():
                    tensor.copy_(stored[name][field])

    def segments_of(self, level: str) -> int:
        """How many segments, from the first, `level` takes."""
        return 1 if not isinstance(self.form, Format) else self.form.levels[::-1].index(level) + 1

    def weights(self, fields: Sequence[tuple[Place, torch.Tensor]], level: str) -> Weights:
        """An expert's parameters over the views of its fields."""
        by_parameter: dict[str, dict[str, torch.Tensor]] = {}
        for place, tensor in fields:
            by_parameter.setdefault(place.parameter, {})[place.field.name] = tensor
        shapes = dict(self.matrices)
        return {
            name: StoredMatrix(self.form, views, shapes[name], level)
            if name in shapes and isinstance(self.form, Format)
            else views[RAW]
            for name, views in by_parameter.items()
        }


@dataclass(frozen=True)
class ReadyLayout(RecordLayout):
    """The records of one layer's experts at `level`, as `plain` ones are packed for `device_type`.

    A format's own record is the same for every device. Where a kernel wants another order, each read is followed by
    putting it in order, by the same few cores that compute, for every miss. These records are put in order once, when
    they are written. Other devices need records of their own, as scales may be rounded to what the kernel takes.
    """

    plain: RecordLayout
    level: str
    device_type: str

    @classmethod
    def made(cls, layer: ExpertLayer, form: Format, level: str, device_type: str) -> ReadyLayout | None:
        """How the experts of `layer` are recorded; None where the device computes with them as they are stored."""
        plain = RecordLayout.of(layer, form)
        places = plain.packed(level, device_type)
        if places is None:
            return None
        return cls(form, plain.matrices, (places,), plain, level, device_type)

    @property
    def encoding_bytes(self) -> int:
        """The plain record comes first."""
        return self.record_bytes + self.plain.record_bytes

    def write(self, parameters: Mapping[str, torch.Tensor], record: torch.Tensor) -> None:
        """Encode an expert's `parameters` into `record` (uint8 [record_bytes])."""
        record.zero_()
        plain = torch.empty(self.plain.record_bytes, dtype=torch.uint8)
        self.plain.write(parameters, plain)
        self.plain.pack(plain, self.segments[0], record, self.level, self.device_type)

    def packed(self, level: str, device_type: str) -> Places | None:
        """None: a slot holds the record."""
        return None

    def segments_of(self, level: str) -> int:
        """The only one."""
        return 1


@dataclass(frozen=True, slots=True, eq=False)
class StoredMatrix:
    """A quantised matrix, over the memory where it lies."""

    form: Format
    fields: Mapping[str, torch.Tensor]
    shape: Shape
    level: str

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [m, k] -> x @ W.T [m, n], in the dtype of x."""
        return self.form.linear(x, self.fields, self.shape.n, self.shape.k, self.level)

    def linear_each(self, x: torch.Tensor, matrices: Sequence[StoredMatrix]) -> torch.Tensor:
        """A row for each of `matrices`, this one and others of its kind: see `Format.linear_each`."""
        fields = [matrix.fields for matrix in matrices]
        return self.form.linear_each(x, fields, self.shape.n, self.shape.k, self.level)


def layouts_of(experts: ExpertMap, name: str) -> list[RecordLayout]:
    """Of every layer, how its experts are recorded at the format `name`."""
    precision = ready_precision(name)
    if precision is not None:
        ready = ready_layouts(experts, precision)
        if ready is None or name != ready_name(precision):
            raise FormatError(f"{name}: this CPU computes with records in another order")
        return ready
    form = form_of(name)
    return [RecordLayout.of(layer, form) for layer in experts.layers]


def ready_layouts(experts: ExpertMap, precision: str) -> list[RecordLayout] | None:
    """Of every layer, how its experts are recorded as this CPU computes with them; None if they lie so anyway."""
    form = form_of(precision)
    if not isinstance(form, Format):
        return None
    made = [ReadyLayout.made(layer, form, precision, "cpu") for layer in experts.layers]
    layouts: list[RecordLayout] = [layout for layout in made if layout is not None]
    return layouts if len(layouts) == len(made) else None


def store_bytes(experts: ExpertMap, names: Sequence[str]) -> int:
    """What records of all experts take on disk."""
    return sum(
        layer.num_experts * layout.record_bytes
        for name in names
        for layer, layout in zip(experts.layers, layouts_of(experts, name), strict=True)
    )


def places_views(places: Places, slot: torch.Tensor) -> list[tuple[Place, torch.Tensor]]:
    """The fields at `places` of `slot` (uint8); no copy."""
    return [(place, _view(slot, place.offset, place.field)) for place in places]


def places_bytes(places: Places) -> int:
    """Bytes of a slot with these fields."""
    return _end(places, BLOCK)


def _in_a_row(fields: Sequence[tuple[str, Field]]) -> Places:
    places, at = [], 0
    for parameter, field in fields:
        places.append(Place(parameter, field, at))
        at = align(at + field.nbytes)
    return tuple(places)


def _end(places: Places, to: int) -> int:
    return align(places[-1].offset + places[-1].field.nbytes, to) if places else 0


def _view(slot: torch.Tensor, offset: int, field: Field) -> torch.Tensor:
    return slot[offset : offset + field.nbytes].view(field.dtype).view(field.shape)
