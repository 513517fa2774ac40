"""One expert of a checkpoint -> its records, and the checksum of what they were made from."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.store.base import SliceReader
from offload.store.plain import CheckpointSlice
from offload.store.record import RecordLayout


@dataclass(frozen=True)
class Encoded:
    """One expert's record at one format."""

    record: torch.Tensor
    checksums: list[int]
    source: int


class Encoder:
    """One thread's way from the checkpoint to records."""

    def __init__(self, experts: ExpertMap) -> None:
        self._experts = experts
        self._reader: SliceReader = CheckpointSlice(experts).open()
        self._slot = torch.zeros(experts.slot_bytes, dtype=torch.uint8)

    def encode(self, key: ExpertKey, layouts: Sequence[RecordLayout]) -> list[Encoded]:
        """An expert's records at every format. Raises TransferError."""
        layer = self._experts.layer_of(key)
        self._reader.read(key, self._slot)
        parameters = layer.views(self._slot)
        source = checksum(layer, self._slot)
        result = []
        for layout in layouts:
            record = torch.empty(layout.record_bytes, dtype=torch.uint8)
            layout.write(parameters, record)
            result.append(Encoded(record, layout.checksums(record), source))
        return result

    def source(self, key: ExpertKey) -> int:
        """The checksum of what the checkpoint has. Raises TransferError."""
        self._reader.read(key, self._slot)
        return checksum(self._experts.layer_of(key), self._slot)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def checksum(layer: ExpertLayer, slot: torch.Tensor) -> int:
    """CRC-32 of an expert's parameters, as they are in `slot`; the gaps between them do not count."""
    result = 0
    for parameter in layer.parameters:
        result = zlib.crc32(slot[parameter.slot_offset : parameter.slot_offset + parameter.nbytes].numpy().data, result)
    return result
