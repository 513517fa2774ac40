"""How fast experts come from a disk: the engine itself reads records of a temporary file.

Store, readers, queues and direct reads are the ones a model runs with; only the records mean nothing. What was written
a moment ago may still lie in a cache of the disk itself, or of a virtual machine's host: no program can empty that.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from cache.errors import DiskSpaceError, ProfileError
from cache.types import ExpertKey, Tier
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.checkpoint.parameter import ExpertParameter, Piece, Source
from offload.checkpoint.shards import TensorInfo
from offload.costs.machine import BlockReads, DiskProfile
from offload.decide.plan import Fetch
from offload.device.arena import HostRegion
from offload.device.base import CpuDevice
from offload.engine.transfer import TransferEngine
from offload.machine.budget import UNLIMITED, Budget, Clock
from offload.store.files import BLOCK, FileReader
from offload.store.plain import CheckpointStore
from offload.store.readers import READERS, readers_for
from offload.system.sizes import format_bytes
from offload.system.timing import rising

RECORD_BYTES = tuple(2**n * 2**18 for n in range(8))  # 256 KiB to 32 MiB
FILE_BYTES = 512 * 2**20
BLOCK_BYTES = (2**16, 2**18, 2**20, 2**22, 2**24)
THREADS = (1, 2, 4, 8)
BURST = 8  # records asked for at once, as a layer of top-8 may miss
_HEADER_BYTES = 8  # tensors of a checkpoint start at multiples of 8, not of a disk's blocks
_CHUNK_BYTES = 2**24
_MOST_S = 0.1
_BESIDE_S = 0.3
_BLOCKS_SHARE = 0.5


class DiskProbe:
    """A temporary file of records on a disk, and an engine that reads them. Made by `open_probe`."""

    def __init__(self, file: Path, record_bytes: Sequence[int], clock: Clock = time.perf_counter) -> None:
        self._file = file
        self._clock = clock
        size = file.stat().st_size - _HEADER_BYTES
        self.record_bytes = tuple(nbytes for nbytes in record_bytes if nbytes * BURST <= size)
        layers = tuple(_layer(i, file, nbytes, size // nbytes) for i, nbytes in enumerate(self.record_bytes))
        rng = np.random.default_rng(0)
        self._orders = [_without_end(rng, layer.num_experts) for layer in layers]
        self._store = CheckpointStore(ExpertMap(layers, {}))
        self._engines: dict[int, TransferEngine] = {}
        self._readers: dict[int, int] = {}

    def read(self, record_bytes: int, count: int = 1) -> list[float]:
        """Reads `count` records asked for at once; returns the time each of them landed, in seconds.

        Called from one thread at a time. Raises TransferError.
        """
        layer = self.record_bytes.index(record_bytes)
        order = self._orders[layer]
        landings, errors = [], []
        engine = self._engine(self._readers.get(record_bytes, READERS))
        engine.submit([Fetch(ExpertKey(layer, next(order)), Tier.DISK, (), {}) for _ in range(count)])
        for transfer in engine.landed():
            landings.append(self._clock())
            if transfer.error is not None:
                errors.append(transfer.error)
            engine.release(transfer)
        if errors:
            raise errors[0]
        return landings

    def close(self) -> None:
        """End the threads that read."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def _engine(self, readers: int) -> TransferEngine:
        if readers not in self._engines:
            device = CpuDevice()
            staging = device.host_slots(readers, max(self.record_bytes))
            self._engines[readers] = TransferEngine(self._store, device, {}, [staging], readers=readers)
        return self._engines[readers]

    def alone_s(self, record_bytes: int) -> float:
        """Seconds from asking for one record to its landing."""
        start = self._clock()
        self.read(record_bytes)
        return self._clock() - start

    def streamed_s(self, record_bytes: int) -> float:
        """Seconds from one landing to the next of a burst."""
        landings = self.read(record_bytes, BURST)
        return (landings[-1] - landings[0]) / (BURST - 1)

    def measure(self, budget: Budget, block_bytes: Sequence[int] = BLOCK_BYTES) -> DiskProfile:
        """Plain reads of blocks by several threads, and then records, alone and streamed, by as many readers as a model
        with such experts would have: from the smallest on, as long as the budget has time for the next size."""
        blocks = tuple(self._blocks(budget.until(_BLOCKS_SHARE), block_bytes))
        self._readers = {nbytes: readers_for(blocks, nbytes) for nbytes in self.record_bytes}
        alone, streamed = dict[int, float](), dict[int, float]()
        for nbytes in self.record_bytes:
            # Reading takes no longer by the byte than it took for smaller records.
            if not budget.fits(BURST * nbytes * min((alone[n] / n for n in alone), default=0.0)):
                break
            self.read(nbytes)  # which makes the engine, or its first use of that memory
            alone[nbytes] = budget.median_of(partial(self.alone_s, nbytes), _MOST_S)
            streamed[nbytes] = budget.median_of(partial(self.streamed_s, nbytes), _MOST_S)
        return DiskProfile(READERS, rising(alone), rising(streamed), blocks)

    def _blocks(self, budget: Budget, block_bytes: Sequence[int]) -> Iterator[BlockReads]:
        best = 0.0  # bytes a second, of any number of threads
        for nbytes in block_bytes:
            for threads in THREADS:
                if nbytes * threads > self._file.stat().st_size - _HEADER_BYTES:
                    continue
                if best and not budget.fits(nbytes * threads / best):
                    continue
                rate = block_bytes_per_s(self._file, nbytes, threads, budget.patience_s(_MOST_S), self._clock)
                best = max(best, rate)
                yield BlockReads(nbytes, threads, rate)


@contextmanager
def open_probe(
    folder: Path,
    file_bytes: int = FILE_BYTES,
    record_bytes: Sequence[int] = RECORD_BYTES,
    budget: Budget = UNLIMITED,
) -> Iterator[DiskProbe]:
    """A probe of the disk that `folder` is on; its file is deleted at the end of the block, and with the process.

    On a slow disk the file is as large as the budget has time for.

    Raises DiskSpaceError before anything is written, and ProfileError when the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < 2 * file_bytes:
            raise DiskSpaceError(
                f"measuring the disk takes a temporary file of {format_bytes(file_bytes)} and leaves as much free: "
                f"{folder} has {format_bytes(free)}: free some, or choose another --disk"
            )
        with tempfile.TemporaryDirectory(prefix="offload-profile-", dir=folder) as temporary:
            file = Path(temporary, "records")
            _write(file, _HEADER_BYTES + file_bytes, budget)
            probe = DiskProbe(file, record_bytes, budget.clock)
            try:
                yield probe
            finally:
                probe.close()
    except OSError as error:
        raise ProfileError(f"{folder} cannot be measured: {error.strerror or error}: choose another --disk") from error


def block_bytes_per_s(
    file: Path, block_bytes: int, threads: int, budget_s: float, clock: Clock = time.perf_counter
) -> float:
    """Bytes a second of direct reads of blocks at random, aligned places of `file`, by so many threads, together."""
    places = (file.stat().st_size - block_bytes) // BLOCK + 1
    start = threading.Barrier(threads + 1)
    read = [0] * threads
    failures = list[BaseException]()

    def work(index: int) -> None:
        rng = np.random.default_rng(index)
        reader = FileReader()
        buffer = HostRegion(block_bytes).array
        start.wait()
        try:
            end = clock() + budget_s
            while not read[index] or clock() < end:
                piece = Piece(str(file), int(rng.integers(places)) * BLOCK, block_bytes, 0)
                read[index] += reader.read([piece], buffer)
        except BaseException as error:  # raised below, on the thread that asked
            failures.append(error)
        finally:
            reader.close()

    workers = [threading.Thread(target=work, args=(i,), name="offload-profile-block") for i in range(threads)]
    for worker in workers:
        worker.start()
    try:
        start.wait()
    except BaseException:  # Ctrl-C: nobody else would let them go
        start.abort()
        raise
    began = clock()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return sum(read) / (clock() - began)


def slowdowns(
    probe: DiskProbe, compute: Callable[[], object], record_bytes: int, budget: Budget
) -> tuple[float, float]:
    """How many times longer `compute` takes while records are read, and reading while `compute` runs; at least 1.

    Each is measured alone and then with the other, at once, so that what else the machine does is the same.
    """
    compute_s = budget.median_s(compute, _BESIDE_S)
    read_s = budget.median_of(lambda: probe.streamed_s(record_bytes), _BESIDE_S)
    done, reads, failures = threading.Event(), list[float](), list[BaseException]()

    def keep_reading() -> None:
        try:
            while not (done.is_set() and reads):
                reads.append(probe.streamed_s(record_bytes))
        except BaseException as error:  # raised below, on the thread that asked
            failures.append(error)

    reader = threading.Thread(target=keep_reading, name="offload-profile-read")
    reader.start()
    try:
        together_s = budget.median_s(compute, 2 * _BESIDE_S)
    finally:
        done.set()
        reader.join()
    if failures:
        raise failures[0]
    return max(1.0, together_s / compute_s), max(1.0, median(reads) / read_s)


def _write(file: Path, nbytes: int, budget: Budget) -> None:
    """Random bytes: a disk that compresses or deduplicates gains nothing. At least one chunk."""
    rng = np.random.default_rng(0)
    with file.open("wb", buffering=0) as stream:
        for start in range(0, nbytes, _CHUNK_BYTES):
            if start and budget.left_s == 0:
                break
            stream.write(rng.bytes(min(_CHUNK_BYTES, nbytes - start)))
            os.fsync(stream.fileno())  # each time, or a slow disk would be waited for at the end


def _layer(index: int, file: Path, record_bytes: int, records: int) -> ExpertLayer:
    """`records` experts of one parameter each, one after the other in `file`."""
    tensor = TensorInfo(str(file), "records", "U8", (records, record_bytes), _HEADER_BYTES, records * record_bytes)
    source = Source("records", (tensor,), fused=True)
    parameter = ExpertParameter("records", "records", (record_bytes,), torch.uint8, 0, 0, (source,), None)
    return ExpertLayer(index, "", records, (parameter,), None)


def _without_end(rng: np.random.Generator, records: int) -> Iterator[int]:
    """Records in random order; each comes again only after all the others."""
    while True:
        yield from rng.permutation(records).tolist()
