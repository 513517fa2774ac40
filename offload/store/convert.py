"""Checkpoint -> records: every expert encoded once, in a file for each format, resumable however it was stopped."""

from __future__ import annotations

import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from cache.errors import BudgetError, DiskSpaceError, StoreError
from cache.outputs import writing
from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertMap
from offload.formats.precision import record_name
from offload.store.encode import Encoded, Encoder
from offload.store.index import Origin, StoreIndex
from offload.store.journal import RecordFile
from offload.store.plain import conversion_bytes
from offload.store.record import layouts_of, store_bytes
from offload.system.cores import usable_cores
from offload.system.paths import exclusive
from offload.system.progress import Bar
from offload.system.sizes import format_bytes

_SPARE_BYTES = 16 * 2**20  # left free on the disk: the index, the journals
_T = TypeVar("_T")


def convert(
    folder: Path,
    origin: Origin,
    experts: ExpertMap,
    names: Sequence[str],
    *,
    memory_bytes: int | None = None,
    bar: Bar | None = None,
) -> StoreIndex:
    """Make sure that `folder` holds records of `experts` at every one of `names`, and give its index.

    What is complete is left as it is, what was begun is continued. `bar` is told how many bytes are to be written and
    which are, and whether another process is at it. `memory_bytes` bounds what it takes besides what the process has.
    Raises DiskSpaceError, before it begins where it can, StoreError for a folder that holds another checkpoint's,
    BudgetError, OutputError, TransferError. Side effect: files in `folder`.
    """
    names = list(dict.fromkeys(record_name(name) for name in names))
    index, shown = StoreIndex.read(folder), bar or Bar()
    if index is not None and all(_complete(index, folder, name, experts) for name in names):
        # Nothing is written, so that a store which cannot be written serves too.
        if index.origin == origin:
            return index
        if not os.access(folder, os.W_OK):
            return confirm(index, folder, origin, experts, shown)
    folder.mkdir(parents=True, exist_ok=True)
    line = "offload: waiting for another process that converts these experts"
    with exclusive(folder / "lock", lambda: shown.say(line)), writing(folder):
        found = StoreIndex.read(folder) or StoreIndex(origin)
        index = confirm(found, folder, origin, experts, shown)
        if found.origin != origin:
            index.write(folder)
        missing = [name for name in names if not _complete(index, folder, name, experts)]
        if missing:
            files = [RecordFile(folder, name, origin, experts) for name in missing]
            try:
                _check_disk(folder, files)
                total, done = (sum(getattr(file, what) for file in files) for what in ("total_bytes", "written_bytes"))
                shown.update(title=f"converting experts to {format_bytes(total)}", total=total, done=done)
                _write_all(files, experts, _workers(files, experts, memory_bytes), shown)
            finally:
                for file in files:
                    file.close()
            for file in files:
                index.formats[file.name] = file.finish()
            index.write(folder)
            for file in files:
                file.forget()
    return index


def confirm(index: StoreIndex, folder: Path, origin: Origin, experts: ExpertMap, bar: Bar) -> StoreIndex:
    """`index`, if it is of this very checkpoint, as one of `origin`. Raises StoreError if it is not.

    Where a file of the checkpoint was touched since, or is not known well enough, every expert that was converted is
    read again and compared; `bar` is told why.
    """
    if index.origin.digest != origin.digest:
        raise StoreError(
            f"{folder} holds experts of {index.origin.model}, converted from another checkpoint than {origin.model}: "
            "name another folder, or remove this one"
        )
    before = index.origin
    if (before.modified, before.samples) == (origin.modified, origin.samples) or not index.formats:
        return StoreIndex(origin, index.formats)
    why = "it was touched since" if before.samples else "an earlier version converted them, and took no samples of it"
    bar.say(f"offload: comparing {origin.model} with its converted experts in {folder}: {why}")
    sources = next(iter(index.formats.values())).sources
    encoder = Encoder(experts)
    try:
        for key in experts.all_keys():
            if encoder.source(key) != sources[key.layer][key.expert]:
                raise StoreError(
                    f"{folder}: {origin.model} was changed after its experts were converted, expert {key.expert} of "
                    f"layer {key.layer} for one: remove the folder, and convert again"
                )
    finally:
        encoder.close()
    return StoreIndex(origin, index.formats)


def _write_all(files: Sequence[RecordFile], experts: ExpertMap, workers: int, bar: Bar) -> None:
    """Encode on so many threads, write in order."""
    local = threading.local()
    encoders: list[Encoder] = []

    def encode(job: tuple[ExpertKey, list[RecordFile]]) -> list[Encoded]:
        if not hasattr(local, "encoder"):
            local.encoder = Encoder(experts)
            encoders.append(local.encoder)
        key, wanting = job
        encoder: Encoder = local.encoder
        return encoder.encode(key, [file.layouts[key.layer] for file in wanting])

    first = min(file.done for file in files)
    jobs = [
        (key, [file for file in files if file.done <= number])
        for number, key in enumerate(experts.all_keys())
        if number >= first
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="offload-encode") as pool:
            for (_, wanting), records in zip(jobs, _in_order(pool, encode, jobs, 2 * workers), strict=True):
                for file, encoded in zip(wanting, records, strict=True):
                    file.append(encoded)
                    bar.advance(len(encoded.record))
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


def _workers(files: Sequence[RecordFile], experts: ExpertMap, memory_bytes: int | None) -> int:
    """Threads that encode at once: one a core, fewer where memory is short. Raises BudgetError where it is too short
    for one."""
    cores = usable_cores()
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


def _check_disk(folder: Path, files: Sequence[RecordFile]) -> None:
    needed = sum(file.total_bytes - file.written_bytes for file in files) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(
            f"{folder}: converted experts need {format_bytes(needed)} more, {format_bytes(free)} are free: "
            "make room, or name another folder with --expert-store"
        )
