"""What the benchmarks share: engines in processes of their own, the disk's speed, and the result line."""

from __future__ import annotations

import json
import mmap
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from cache.errors import OffloadError
from scripts.bench.cgroup import MemoryCgroup, Usage
from scripts.bench.serve import Answer as Answer
from scripts.bench.serve import Request as Request
from scripts.bench.serve import serve as serve

_ALIGN = 4096  # direct reads need offsets, lengths and addresses in multiples of this


class BenchmarkError(OffloadError):
    """An engine died or the machine cannot run this benchmark."""


class Worker:
    """One engine in a process of its own, answering requests one at a time; idle in between.

    Separate processes keep engines' memory, threads and page cache apart, and let a benchmark alternate
    between engines that are all loaded. With `memory_bytes` the process is alone in a memory cgroup of that
    size. Leaving the context ends the process and sets `peak_rss_bytes`, its largest resident set.
    """

    def __init__(self, name: str, command: Sequence[str], memory_bytes: int | None = None) -> None:
        self.name = name
        self.peak_rss_bytes = 0
        self._command = list(command)
        self._group = MemoryCgroup(memory_bytes) if memory_bytes else None

    def __enter__(self) -> Worker:
        if self._group:
            self._group.__enter__()
            self._command = self._group.command(self._command)
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        process = self._process
        assert process.stdin and process.stdout
        if kind is not None:
            os.kill(process.pid, signal.SIGKILL)  # Popen.kill would reap it first
        process.stdin.close()  # the end of its requests: it stops
        process.stdout.close()
        _, status, resources = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # reaped here: nothing is left for Popen
        self.peak_rss_bytes = resources.ru_maxrss * 1024
        if self._group:
            self._group.__exit__(kind, error, traceback)

    def ask(self, **request: Any) -> Answer:
        """Send one request and wait for its answer. Raises BenchmarkError when the engine ends instead."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):  # it ended: there is no answer either
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            usage = self.usage()
            why = "killed for memory" if usage and usage.oom_kills else "its own message is above"
            raise BenchmarkError(f"{self.name} ended early: {why}")
        answer: Answer = json.loads(line)
        return answer

    def usage(self) -> Usage | None:
        """What its cgroup has counted so far; None without a cgroup."""
        return self._group.usage() if self._group else None


def worker_command(script: str, argv: Sequence[str], *args: object) -> list[str]:
    """The command that runs `script` as a worker: this interpreter, the benchmark's `argv`, and `args`."""
    return [sys.executable, script, *argv, *map(str, args)]


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises BenchmarkError when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BenchmarkError(f"{folder} holds no *.safetensors: write one with scripts/bench/make_checkpoint.py")
    return files


def drop_page_cache(files: Sequence[Path]) -> None:
    """Ask the kernel to forget the cached pages of `files`, so that the next read comes from the disk."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def disk_bandwidth(
    files: Sequence[Path],
    record_bytes: int,
    *,
    seed: int,
    total_bytes: int = 1 << 30,
    threads: Sequence[int] = (1, 2, 4),
) -> float:
    """Bytes/s of direct reads of `record_bytes` at random places of `files`: the best of `threads`, in turn.

    Direct reads pass the page cache by, so this is the disk's own speed. Each count reads `total_bytes`.
    """
    record = -(-record_bytes // _ALIGN) * _ALIGN
    places = [path for path in files if path.stat().st_size > record]
    if not places:
        raise BenchmarkError(f"no shard is larger than one record of {record_bytes} bytes")
    rng = random.Random(seed)
    best = 0.0
    handles = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in places}
    try:
        for count in threads:
            reads = []
            for _ in range(max(count, total_bytes // record)):
                path = rng.choice(places)
                last = (path.stat().st_size - record) // _ALIGN
                reads.append((handles[path], rng.randint(0, last) * _ALIGN))
            best = max(best, len(reads) * record / _timed_reads(reads, record, count))
    finally:
        for handle in handles.values():
            os.close(handle)
    return best


def _timed_reads(reads: list[tuple[int, int]], record: int, threads: int) -> float:
    """Seconds that `threads` threads need for `reads` of (file, offset), each into its own warm buffer."""
    todo = iter(reads)
    lock = threading.Lock()
    start = threading.Barrier(threads + 1)
    errors: list[OSError] = []

    def work() -> None:
        buffer = mmap.mmap(-1, record)  # page-aligned
        buffer.write(bytes(record))
        view = memoryview(buffer)
        start.wait()
        try:
            while True:
                with lock:
                    read = next(todo, None)
                if read is None:
                    return
                handle, offset = read
                done = 0
                while done < record:
                    done += os.preadv(handle, [view[done:]], offset + done)
        except OSError as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - began
    if errors:
        raise BenchmarkError(f"direct reads failed: {errors[0]}")
    return seconds


def random_ids(count: int, vocab: int, seed: int) -> list[int]:
    """`count` token ids, fixed by `seed`: unlike a random model's own text, they keep on changing experts."""
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(count)]


def default_threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": default_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
    }


def note(text: str) -> None:
    """A line about progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def run(benchmark: Callable[[], dict[str, Any]]) -> int:
    """Run `benchmark`, print its result as one JSON line, return the exit code."""
    try:
        result = benchmark()
    except OffloadError as error:
        note(f"error: {error}")
        return 2
    print(json.dumps(result | {"machine": machine()}))
    return 0
