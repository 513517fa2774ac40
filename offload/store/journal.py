"""The file that records are appended to, and the journal that says which of them are there.

Records are written in order, and each one's checksums follow in the journal once it is there. Whoever finds both goes
on behind the last record that the journal knows. Encoding is deterministic, so the file comes out the same. Containers
such as safetensors' are written in one go: there is nothing to continue.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import BinaryIO

from offload.checkpoint.layout import ExpertMap
from offload.store.encode import Encoded
from offload.store.index import Entry, Origin
from offload.store.record import layouts_of, store_bytes
from offload.system.paths import fsync_folder


class RecordFile:
    """A file of records while it is written, and its journal."""

    def __init__(self, folder: Path, name: str, origin: Origin, experts: ExpertMap) -> None:
        self.name = name
        self.layouts = layouts_of(experts, name)
        self._experts = experts
        self._folder = folder
        self._part = folder / f"{name}.experts.part"
        self._journal_path = folder / f"{name}.journal"
        self._header = json.dumps(
            {"origin": vars(origin), "segments": [list(layout.segment_bytes) for layout in self.layouts]}
        )
        self._records: list[list[int]] = []  # of each that is done: source, then segments
        self.total_bytes = store_bytes(experts, [name])
        self._resume()
        self.done = len(self._records)
        offsets = [0]
        for key in experts.all_keys():
            offsets.append(offsets[-1] + self.layouts[key.layer].record_bytes)
        self.written_bytes = offsets[self.done]
        self._data: BinaryIO = self._part.open("r+b" if self._part.exists() else "w+b")
        self._data.seek(self.written_bytes)
        self._data.truncate()
        self._journal: BinaryIO = self._journal_path.open("ab")

    def _resume(self) -> None:
        """Take over what a conversion of the same checkpoint has finished; begin a journal if there is none."""
        final = self._folder / f"{self.name}.experts"
        try:
            if not self._part.exists() and self._journal_path.exists():
                final.replace(self._part)  # it was stopped with all records there, before the index was written
            with self._journal_path.open("rb") as file:
                header = file.readline().decode("utf-8", "replace").rstrip("\n")
                body = file.read()
            size = self._part.stat().st_size
        except FileNotFoundError:
            header, body, size = "", b"", 0
        kept = len(header.encode()) + 1
        if header != self._header:
            self._journal_path.write_text(self._header + "\n")
            self._part.unlink(missing_ok=True)
            return
        at = written = 0
        for key in self._experts.all_keys():
            layout = self.layouts[key.layer]
            count = 1 + len(layout.segments)
            written += layout.record_bytes
            if at + 4 * count > len(body) or written > size:
                break
            self._records.append(list(struct.unpack_from(f"<{count}I", body, at)))
            at += 4 * count
        os.truncate(self._journal_path, kept + at)

    def append(self, encoded: Encoded) -> None:
        """The next record. Raises OSError."""
        self._data.write(encoded.record.numpy().data)
        self._data.flush()
        entry = [encoded.source, *encoded.checksums]
        self._journal.write(struct.pack(f"<{len(entry)}I", *entry))
        self._journal.flush()
        self._records.append(entry)
        self.done += 1
        self.written_bytes += len(encoded.record)

    def close(self) -> None:
        """Keep what is done."""
        self._data.close()
        self._journal.close()

    def finish(self) -> Entry:
        """Give the complete file its name."""
        with self._part.open("rb") as file:
            os.fsync(file.fileno())
        file_name = f"{self.name}.experts"
        self._part.replace(self._folder / file_name)
        fsync_folder(self._folder)
        records = iter(self._records)
        by_layer = [[next(records) for _ in range(layer.num_experts)] for layer in self._experts.layers]
        return Entry(
            file_name,
            [list(layout.segment_bytes) for layout in self.layouts],
            [[entry[1:] for entry in layer] for layer in by_layer],
            [[entry[0] for entry in layer] for layer in by_layer],
        )

    def forget(self) -> None:
        """The index knows all that the journal did."""
        self._journal_path.unlink(missing_ok=True)
