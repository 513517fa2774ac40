"""Engines in processes of their own, as a benchmark sees them: it sends a request and waits for the answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from scripts.bench.cgroup import MemoryCgroup, Usage
from scripts.bench.common import BenchmarkError, note
from scripts.bench.serve import Answer

ROOT = Path(__file__).resolve().parents[2]


class EngineError(BenchmarkError):
    """An engine cannot go on; `why`."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} ended early: {why}")
        self.why = why


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
        note(f"loading {self.name}")
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
        """Send one request and wait for its answer. Raises EngineError when it cannot, or ends instead."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):  # it ended: there is no answer either
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            usage = self.usage()
            why = "killed for memory" if usage and usage.oom_kills else "its own message is above"
            raise EngineError(self.name, why)
        answer: Answer = json.loads(line)
        if "unable" in answer:
            raise EngineError(self.name, answer["unable"])
        return answer

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def resident_peak_bytes(self) -> int | None:
        """Its largest resident set so far; None once it has ended.

        What is known of an ended process counts the one that started it, too, until it ran the worker's program.
        """
        with suppress(OSError):
            for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return None

    def usage(self) -> Usage | None:
        """What its cgroup has counted so far; None without a cgroup."""
        return self._group.usage() if self._group else None


def engine_command(engine: str, checkpoint: Path, *, checkout: Path | None = None, **options: Any) -> list[str]:
    """The command of an engine of `engines.py`, loaded with `options`.

    The packages are those of `checkout`, by default of this one. Of another only what stays is used: `OffloadedModel`.
    """
    said = json.dumps({"engine": engine, "checkpoint": str(checkpoint), **options}, default=str)
    packages = ROOT if checkout is None else checkout.resolve()
    return ["env", f"PYTHONPATH={packages}", sys.executable, str(ROOT / "scripts/bench/engines.py"), said]
