"""How many threads read experts from disk: as many as the disk gains by, as the machine's profile says. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

from cache.errors import ProfileError
from offload.costs.machine import BlockReads, MachineProfile
from offload.system.paths import machine_profile_path

READERS = 2
"""Where nothing was measured, and the fewest: one checks what it has read, or puts it in order, while the other one
waits for the disk. Twice as many where all of it has to be copied to its place (`ExpertStore.readers_per_place`)."""

_GAIN = 1.1  # less is within what two measurements of one disk differ by, and every reader takes memory


def readers_for(blocks: Sequence[BlockReads], record_bytes: int) -> int:
    """The fewest threads that make the most of a disk, within a tenth, by reads of about `record_bytes` each."""
    if not blocks:
        return READERS
    nearest = min({each.block_bytes for each in blocks}, key=lambda nbytes: abs(math.log(nbytes / record_bytes)))
    rates = {each.threads: each.bytes_per_s for each in blocks if each.block_bytes == nearest}
    best = max(rates.values())
    return max(READERS, min(threads for threads, rate in rates.items() if _GAIN * rate >= best))


def readers_here(record_bytes: int) -> int:
    """The same on this machine, if it was measured."""
    with suppress(ProfileError, OSError):
        return readers_for(MachineProfile.read(machine_profile_path()).disk.blocks, record_bytes)
    return READERS
