"""Records that lie on disk as a device computes with them: read straight into their slots, with nothing left to do.

A format's own record is the same for every device. Where a kernel wants another order, each read is followed by putting
it in order, by the same few cores that compute, for every miss. These records are put in order once, when they are
written. Other devices need records of their own, as scales may be rounded to what the kernel takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from offload.checkpoint.layout import ExpertLayer
from offload.formats import Format
from offload.store.record import Places, RecordLayout


@dataclass(frozen=True)
class ReadyLayout(RecordLayout):
    """The records of one layer's experts at `level`, as `plain` ones are packed for `device_type`."""

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
