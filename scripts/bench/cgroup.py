"""Run a command alone in a memory cgroup: what it allocates and the page cache it fills share one hard limit.

    python scripts/bench/cgroup.py --memory 4G -- python scripts/something.py

Both versions of the kernel's interface are served. The kernel drops page cache when the limit is met, and
kills the command when that is not enough. Needs Linux and the right to create cgroups: usually, to be root.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cache.errors import DeviceError, OffloadError
from offload.system.sizes import format_bytes, parse_bytes


@dataclass(frozen=True)
class Usage:
    """What the kernel counted for one cgroup. `limit_hits`: times the limit was met, which is no error."""

    limit_bytes: int
    peak_bytes: int
    limit_hits: int
    oom_kills: int


class MemoryCgroup:
    """A new memory cgroup of `limit_bytes`, without swap, removed on exit: its processes must have ended.

    `proc` and `mounts` are where the kernel says what is mounted and which cgroups this process is in.
    Raises DeviceError when this machine or user cannot make one.
    """

    def __init__(
        self, limit_bytes: int, *, mounts: Path = Path("/proc/mounts"), proc: Path = Path("/proc/self/cgroup")
    ) -> None:
        self.limit_bytes = limit_bytes
        self._v2, parent = _parent(mounts, proc)
        self.path = parent / f"offload-{os.getpid()}-{time.monotonic_ns()}"

    def __enter__(self) -> MemoryCgroup:
        try:
            self.path.mkdir()
        except OSError as error:
            raise DeviceError(f"cannot create {self.path} ({error.strerror}): run as root") from error
        try:
            if self._v2:
                self._write("memory.max", self.limit_bytes)
                if (self.path / "memory.swap.max").exists():
                    self._write("memory.swap.max", 0)
            else:
                self._write("memory.limit_in_bytes", self.limit_bytes)
                if (self.path / "memory.memsw.limit_in_bytes").exists():
                    self._write("memory.memsw.limit_in_bytes", self.limit_bytes)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def command(self, command: Sequence[str]) -> list[str]:
        """`command` wrapped so that it enters this cgroup before its first instruction."""
        return ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def usage(self) -> Usage:
        """The kernel's counters; read them before leaving the context."""
        if self._v2:
            events = self._counters("memory.events")
            peak = self.path / "memory.peak"  # Linux 5.19
            peak_bytes = int(peak.read_text()) if peak.exists() else int(self._read("memory.current"))
            return Usage(self.limit_bytes, peak_bytes, events.get("max", 0), events.get("oom_kill", 0))
        limits = ("memory.failcnt", "memory.memsw.failcnt")  # whichever of the two is met first counts
        return Usage(
            self.limit_bytes,
            int(self._read("memory.max_usage_in_bytes")),
            sum(int(self._read(name)) for name in limits if (self.path / name).exists()),
            self._counters("memory.oom_control").get("oom_kill", 0),
        )

    def _read(self, name: str) -> str:
        return (self.path / name).read_text()

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(f"{value}\n")

    def _counters(self, name: str) -> dict[str, int]:
        return {key: int(value) for key, value in (line.split() for line in self._read(name).splitlines())}

    def _remove(self) -> None:
        deadline = time.monotonic() + 5
        while (self.path / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)  # a process that was just killed may still be leaving
        try:
            self.path.rmdir()
        except OSError as error:
            raise DeviceError(f"cannot remove {self.path} ({error.strerror}): end the processes in it") from error


def _parent(mounts: Path, proc: Path) -> tuple[bool, Path]:
    """(is it version 2, the cgroup in which one with a memory limit can be made).

    v1: this process's own cgroup. v2: the nearest ancestor that hands memory control to its children, since a
    cgroup with processes in it may not.
    """
    if not mounts.exists() or not proc.exists():
        raise DeviceError("memory cgroups need Linux with /proc mounted")
    own: dict[str, str] = {}
    for line in proc.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for line in mounts.read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            inside = Path(where + own["memory"])
            return False, inside if inside.is_dir() else Path(where)
        if kind == "cgroup2" and "" in own:
            root = Path(where)
            inside = Path(where + own[""])
            for candidate in (inside, *inside.parents):
                control = candidate / "cgroup.subtree_control"
                if control.exists() and "memory" in control.read_text().split():
                    return True, candidate
                if candidate == root:
                    break
    raise DeviceError("no memory cgroup here: no mounted hierarchy offers the memory controller")


def unavailable(limit_bytes: int = 1 << 30) -> str | None:
    """Why memory cgroups cannot be used here, or None when they can."""
    try:
        with MemoryCgroup(limit_bytes):
            return None
    except OffloadError as error:
        return str(error)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the command's exit code, 137 when the kernel killed it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--memory", required=True, help="the limit, such as 4G or 1.6GB")
    parser.add_argument("command", nargs="+", help="the command and its arguments, after --")
    args = parser.parse_args(argv)
    try:
        with MemoryCgroup(parse_bytes(args.memory, "--memory")) as group:
            code = subprocess.run(group.command(args.command)).returncode
            usage = group.usage()
    except OffloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    killed = ", killed for memory" if usage.oom_kills else ""
    print(
        f"cgroup: peak {format_bytes(usage.peak_bytes)} of {format_bytes(usage.limit_bytes)}, "
        f"limit met {usage.limit_hits} times{killed}",
        file=sys.stderr,
    )
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
