"""Checkpoint -> records: every expert encoded once, in a file for each format, resumable however it was stopped.

Records are written in order, and each one's checksums follow in a journal once it is there. Whoever finds both goes on
behind the last record that the journal knows. Encoding is deterministic, so the file comes out the same.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch

from cache.errors import BudgetError, DiskSpaceError, FormatError, StoreError
from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.formats import Format
from offload.formats.precision import form_of, ready_precision, record_name
from offload.store.base import SliceReader
from offload.store.index import Entry, Origin, StoreIndex
from offload.store.plain import CheckpointSlice, conversion_bytes
from offload.store.ready_record import ReadyLayout
from offload.store.record import RecordLayout
from offload.system.paths import exclusive, fsync_folder
from offload.system.sizes import format_bytes

OnRecord = Callable[[int], object]
_SPARE_BYTES = 16 * 2**20  # left free on the disk: the index, the journals
_T = TypeVar("_T")


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


def layouts_of(experts: ExpertMap, name: str) -> list[RecordLayout]:
    """Of every layer, how its experts are recorded at the format `name`."""
    precision = ready_precision(name)
    if precision is not None:
        ready = ready_layouts(experts, precision)
        if ready is None:
            raise FormatError(f"{name}: this CPU computes with records as they are stored")
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


def convert(
    folder: Path,
    origin: Origin,
    experts: ExpertMap,
    names: Sequence[str],
    *,
    memory_bytes: int | None = None,
    on_start: Callable[[int, int], object] | None = None,
    on_record: OnRecord | None = None,
    waiting: Callable[[], object] | None = None,
) -> StoreIndex:
    """Make sure that `folder` holds records of `experts` at every one of `names`, and give its index.

    What is complete is left as it is, what was begun is continued. `on_start` is called with (bytes to write in all,
    of which done), `on_record` with bytes as they are written, `waiting` once if another process is at it.
    `memory_bytes` bounds what it takes besides what the process has. Raises DiskSpaceError before it begins,
    StoreError for a folder that holds another checkpoint's, BudgetError, TransferError. Side effect: files in `folder`.
    """
    names = list(dict.fromkeys(record_name(name) for name in names))
    index = StoreIndex.read(folder)
    if index is not None and index.origin == origin and all(_complete(index, folder, name, experts) for name in names):
        return index  # nothing is written, so that a store which cannot be written serves too
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / "lock", waiting):
        index = StoreIndex.read(folder) or StoreIndex(origin)
        index = confirm(index, folder, origin, experts)
        missing = [name for name in names if not _complete(index, folder, name, experts)]
        if missing:
            files = [_RecordFile(folder, name, origin, experts) for name in missing]
            try:
                _check_disk(folder, files)
                if on_start is not None:
                    on_start(sum(file.total_bytes for file in files), sum(file.written_bytes for file in files))
                _write_all(files, experts, _workers(files, experts, memory_bytes), on_record)
            finally:
                for file in files:
                    file.close()
            for file in files:
                index.formats[file.name] = file.finish()
            index.write(folder)
            for file in files:
                file.forget()
    return index


def confirm(index: StoreIndex, folder: Path, origin: Origin, experts: ExpertMap) -> StoreIndex:
    """`index`, if it is of this very checkpoint. Raises StoreError if it is not.

    Where a file of the checkpoint was touched since, every expert that was converted is read again and compared.
    """
    if index.origin.digest != origin.digest:
        raise StoreError(
            f"{folder} holds experts of {index.origin.model}, converted from another checkpoint than {origin.model}: "
            "name another folder, or remove this one"
        )
    if index.origin.modified == origin.modified or not index.formats:
        return StoreIndex(origin, index.formats)
    sources = next(iter(index.formats.values())).sources
    encoder = Encoder(experts)
    try:
        for key in _keys(experts):
            if encoder.source(key) != sources[key.layer][key.expert]:
                raise StoreError(
                    f"{folder}: {origin.model} was changed after its experts were converted, expert {key.expert} of "
                    f"layer {key.layer} for one: remove the folder, and convert again"
                )
    finally:
        encoder.close()
    index = StoreIndex(origin, index.formats)
    index.write(folder)
    return index


class _RecordFile:
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
        for key in _keys(experts):
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
        for key in _keys(self._experts):
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


def _write_all(files: Sequence[_RecordFile], experts: ExpertMap, workers: int, on_record: OnRecord | None) -> None:
    """Encode on so many threads, write in order."""
    local = threading.local()
    encoders: list[Encoder] = []

    def encode(job: tuple[ExpertKey, list[_RecordFile]]) -> list[Encoded]:
        if not hasattr(local, "encoder"):
            local.encoder = Encoder(experts)
            encoders.append(local.encoder)
        key, wanting = job
        encoder: Encoder = local.encoder
        return encoder.encode(key, [file.layouts[key.layer] for file in wanting])

    first = min(file.done for file in files)
    jobs = [
        (key, [file for file in files if file.done <= number])
        for number, key in enumerate(_keys(experts))
        if number >= first
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="offload-encode") as pool:
            for (_, wanting), records in zip(jobs, _in_order(pool, encode, jobs, 2 * workers), strict=True):
                for file, encoded in zip(wanting, records, strict=True):
                    file.append(encoded)
                    if on_record is not None:
                        on_record(len(encoded.record))
    finally:
        torch.set_num_threads(threads)
        for encoder in encoders:
            encoder.close()


_Job = TypeVar("_Job")


def _in_order(pool: ThreadPoolExecutor, work: Callable[[_Job], _T], jobs: Sequence[_Job], ahead: int) -> Iterator[_T]:
    """What `work` makes of each job, in order, with no more than `ahead` results waiting."""
    running: deque[Future[_T]] = deque()
    try:
        for job in jobs:
            running.append(pool.submit(work, job))
            if len(running) >= ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def _workers(files: Sequence[_RecordFile], experts: ExpertMap, memory_bytes: int | None) -> int:
    """Threads that encode at once: one a core, fewer where memory is short. Raises BudgetError where it is too short
    for one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if memory_bytes is None:
        return cores
    largest = max(torch.Size(p.shape).numel() for layer in experts.layers for p in layer.parameters)
    # The expert, what reading it takes, a few float32 copies of its largest matrix, and its records: those being made,
    # and two on their way to each file.
    records = sum(max(layout.encoding_bytes for layout in file.layouts) for file in files)
    each = 2 * experts.slot_bytes + conversion_bytes(experts) + 16 * largest + 3 * records
    if memory_bytes < each:
        raise BudgetError(
            f"converting an expert takes {format_bytes(each)} of memory, {format_bytes(max(memory_bytes, 0))} are left"
            ": raise --cpu-mem where there is one, or run `offload convert` first; else close other programs"
        )
    return int(min(cores, memory_bytes // each))


def _complete(index: StoreIndex, folder: Path, name: str, experts: ExpertMap) -> bool:
    """Whether the folder holds all records at this format, as this program lays them out."""
    entry = index.formats.get(name)
    if entry is None:
        return False
    path = folder / entry.file
    return (
        path.is_file()
        and entry.segments == [list(layout.segment_bytes) for layout in layouts_of(experts, name)]
        and path.stat().st_size == store_bytes(experts, [name])
    )


def _check_disk(folder: Path, files: Sequence[_RecordFile]) -> None:
    needed = sum(file.total_bytes - file.written_bytes for file in files) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(
            f"{folder}: converted experts need {format_bytes(needed)} more, {format_bytes(free)} are free: "
            "make room, or name another folder with --expert-store"
        )


def _keys(experts: ExpertMap) -> Iterator[ExpertKey]:
    """Every expert, in the order of the records."""
    for layer in experts.layers:
        for expert in range(layer.num_experts):
            yield ExpertKey(layer.index, expert)
