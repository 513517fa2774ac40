"""What the control groups of this process leave it of memory: Linux, both versions, every level of the hierarchy.

A limit binds whoever is anywhere below it: systemd, Slurm and containers set theirs at different levels. A group's page
cache counts against its limit, but the kernel gives it up before it kills anybody.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class _Names:
    """How one version of the interface calls a group's files, and the counters of `memory.stat` with those below."""

    limits: tuple[str, ...]
    used: str
    prefix: str


_V1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
_V2 = _Names(("memory.max", "memory.high"), "memory.current", "")


def free_bytes(resident: int, process: Path = Path("/proc/self"), root: Path = Path("/")) -> int | None:
    """The least memory that a group this process is in has left; None where no group has a limit.

    Never more than a limit leaves beside the `resident` bytes of this process: libraries that another group read first
    count there, and not here. `root` is where the paths of the file systems begin.
    """
    rooms = (_room(level, names, resident) for level, names in _levels(process, root))
    return min((room for room in rooms if room is not None), default=None)


def _levels(process: Path, root: Path) -> Iterator[tuple[Path, _Names]]:
    """The folder of every group this process is in, from its own up to the topmost that is visible."""
    own = dict[str, str]()
    for line in _lines(process / "cgroup"):
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(process / "mountinfo"):
        place, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        _, _, _, top, mounted, *_ = map(_unescaped, place.split(" "))
        if kind == "cgroup2" and "" in own:
            names, path = _V2, own[""]
        elif kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            names, path = _V1, own["memory"]
        else:
            continue
        where = root / mounted.lstrip("/")
        inside = PurePosixPath(path)
        # Inside a container the path may be one of the host, of which nothing is mounted but the container's group.
        inside = inside.relative_to(top) if inside.is_relative_to(top) else PurePosixPath()
        for level in (inside, *inside.parents):
            yield where / level, names


def _room(level: Path, names: _Names, resident: int) -> int | None:
    """What the group in the folder `level` has left under its own limit, if it has one."""
    limits = [int(line) for name in names.limits for line in _lines(level / name) if line.isdecimal()]
    used = _lines(level / names.used)
    if not limits or not used:
        return None
    counted = {name: value for name, _, value in (line.partition(" ") for line in _lines(level / "memory.stat"))}

    def pages(name: str) -> int:
        return int(counted.get(names.prefix + name, 0))

    reclaimable = max(pages("inactive_file") + pages("active_file") - pages("mapped_file") - pages("file_mapped"), 0)
    return max(min(limits) - max(int(used[0]) - reclaimable, resident), 0)


def _lines(file: Path) -> list[str]:
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return []


def _unescaped(path: str) -> str:
    """A path as the kernel lists it, with spaces and such in octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
