"""How many of the machine's cores this process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Those that the operating system lets it run on; at least one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_most_cores(threads: int | None) -> int | None:
    """`threads`, and no more than there are cores: more would only wait for each other. None stays None."""
    return None if threads is None else min(threads, usable_cores())


def too_many_threads(threads: int | None) -> str | None:
    """What to say of more `threads` than there are cores."""
    cores = usable_cores()
    if threads is None or threads <= cores:
        return None
    return f"--threads {threads}: this program may use {cores} cores here, so as many threads compute"
