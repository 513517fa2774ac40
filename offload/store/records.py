"""Converted experts: one aligned record each, read straight into its slot and checked when it is first read."""

from __future__ import annotations

import logging
import mmap
import threading
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from cache.errors import StoreError, TransferError
from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.parameter import Piece
from offload.store.base import ExpertSlice, SliceReader
from offload.store.encode import Encoder
from offload.store.files import PART_BYTES, FileReader, cut
from offload.store.index import Entry
from offload.store.record import RecordLayout, places_bytes
from offload.system.seen import SeenFile

_log = logging.getLogger("offload.store.base")


class RecordSlice(ExpertSlice):
    """Segments `first` to `last` (exclusive) of every record of one file.

    With `level`, the slice is that level of its format, and lies in its slot as the format computes with it on
    `device_type`; without, it is what a better level adds to another slice, and lies there as stored.

    Every segment is compared with its checksum the first time it is read, and one that differs is encoded from the
    checkpoint again. That takes memory which no plan counts, for a moment: the expert as it is, and a few copies of its
    largest matrix.
    """

    def __init__(
        self,
        name: str,
        file: SeenFile | None,
        entry: Entry | None,
        experts: ExpertMap,
        layouts: Sequence[RecordLayout],
        segments: tuple[int, int],
        level: str | None,
        device_type: str,
        direct: bool = True,
    ) -> None:
        self.name = name
        self.layouts = layouts
        self.first, self.last = segments
        self.level = level
        self.device_type = device_type
        self.packed = [None if level is None else layout.packed(level, device_type) for layout in layouts]
        self._experts = experts
        self._direct = direct
        self._file = file
        self._entry = entry
        counts = [layer.num_experts for layer in experts.layers]
        sizes = [layout.record_bytes * count for layout, count in zip(layouts, counts, strict=True)]
        self._layer_starts = [0, *accumulate(sizes)]
        self._skipped = [sum(layout.segment_bytes[: self.first]) for layout in layouts]
        self._nbytes = [sum(layout.segment_bytes[self.first : self.last]) for layout in layouts]
        self._verified = [bytearray(count) for count in counts]
        self._repairing = threading.Lock()
        self.repaired: list[ExpertKey] = []
        """Experts whose records had to be encoded again."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of memory that any expert's slice fits in."""
        return max(
            nbytes if places is None else places_bytes(places)
            for nbytes, places in zip(self._nbytes, self.packed, strict=True)
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts' slices on disk."""
        return sum(nbytes * layer.num_experts for nbytes, layer in zip(self._nbytes, self._experts.layers, strict=True))

    @property
    def reader_bytes(self) -> int:
        """The record as it is stored, where it is packed."""
        return max((n for n, places in zip(self._nbytes, self.packed, strict=True) if places is not None), default=0)

    def open(self) -> RecordReader:
        """A reader for one thread."""
        return RecordReader(self)

    def record_bytes(self, key: ExpertKey) -> int:
        """What the expert's slice takes on disk."""
        return self._nbytes[key.layer]

    def parts(self, key: ExpertKey, readers: int) -> int:
        """One the first time, when all of it is checked, and where it is packed."""
        if not self._verified[key.layer][key.expert] or self.packed[key.layer] is not None:
            return 1
        return max(1, min(readers, self._nbytes[key.layer] // PART_BYTES))

    def piece(self, key: ExpertKey) -> Piece:
        """Where the slice lies in the file. Raises ValueError where nothing can be read."""
        if self._file is None:
            raise ValueError("experts that were planned, and not converted")
        layer, expert = key
        record = self._layer_starts[layer] + expert * self.layouts[layer].record_bytes
        return Piece(self._file.path, record + self._skipped[layer], self._nbytes[layer], 0)

    def files(self) -> FileReader:
        """A reader of the file. Where reads are aligned it needs no bounce buffer."""
        return FileReader(self._direct, seen={} if self._file is None else {self._file.path: self._file})

    def check(self, key: ExpertKey, slice_bytes: torch.Tensor) -> None:
        """Compare what was read (uint8) with the checksums, once; mend it, there and in the file, if it differs.

        Raises StoreError when the checkpoint does not give what was converted from it, TransferError when it, or the
        file, was changed.
        """
        layer, expert = key
        if self._verified[layer][expert] or self._entry is None:
            return
        wanted = self._entry.checksums[layer][expert][self.first : self.last]
        if self._checksums(layer, slice_bytes) != wanted:
            with self._repairing:
                self._repair(key, slice_bytes)
        self._verified[layer][expert] = 1

    def _checksums(self, layer: int, slice_bytes: torch.Tensor) -> list[int]:
        data, at, result = slice_bytes.numpy(), 0, []
        for nbytes in self.layouts[layer].segment_bytes[self.first : self.last]:
            result.append(zlib.crc32(data[at : at + nbytes].data))
            at += nbytes
        return result

    def _repair(self, key: ExpertKey, slice_bytes: torch.Tensor) -> None:
        layer, expert = key
        file, entry = self._file, self._entry
        if file is None or entry is None:
            return
        encoder = Encoder(self._experts)
        try:
            (encoded,) = encoder.encode(key, [self.layouts[layer]])
        finally:
            encoder.close()
        where = f"the record of expert {expert} in layer {layer} in {file.path}"
        if encoded.checksums != entry.checksums[layer][expert]:
            raise StoreError(
                f"{where} is damaged, and the checkpoint does not give the same again: "
                "it was changed, too; remove the folder, and convert again"
            )
        skipped = self._skipped[layer]
        slice_bytes.copy_(encoded.record[skipped : skipped + self._nbytes[layer]])
        self.repaired.append(key)
        _log.warning("%s was damaged, and has been made anew from the checkpoint", where)
        try:
            piece = self.piece(key)
            with Path(file.path).open("r+b") as stream, file.changing(stream.fileno()):
                stream.seek(piece.offset - skipped)
                stream.write(encoded.record.numpy().data)
                stream.flush()
        except OSError as error:  # a read-only store still serves
            _log.warning("%s could not be mended on disk: %s", where, error.strerror or error)


class RecordReader(SliceReader):
    """Reads records into slots, by way of scratch memory where they are packed."""

    def __init__(self, source: RecordSlice) -> None:
        self._source = source
        self._files = source.files()
        self._scratch_map: mmap.mmap | None = None
        self._scratch = torch.empty(0, dtype=torch.uint8)
        if source.reader_bytes:
            self._scratch_map = mmap.mmap(-1, source.reader_bytes)  # aligned to pages
            self._scratch = torch.from_numpy(np.frombuffer(self._scratch_map, np.uint8))

    def read(self, key: ExpertKey, slot: torch.Tensor, part: int = 0, parts: int = 1) -> int:
        """Fill `slot` with the expert's slice. Raises StoreError too: see `RecordSlice.check`."""
        source = self._source
        piece, packed = source.piece(key), source.packed[key.layer]
        target = (slot if packed is None else self._scratch)[: piece.nbytes]
        total = self._files.read(cut([piece], parts)[part], target.numpy())
        if parts == 1:
            try:
                source.check(key, target)
            except StoreError as error:
                raise TransferError(str(error)) from error
        if packed is not None and source.level is not None:
            source.layouts[key.layer].pack(target, packed, slot, source.level, source.device_type)
        return total

    def close(self) -> None:
        """Close the file."""
        self._files.close()
