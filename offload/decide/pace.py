"""How fast passes go: what prefetching needs to know of time, told to it from outside.

Live the runtime measures it, in a replay the simulated clock says it. Either way it is an argument of decisions, and a
log of them keeps it: nothing here looks at a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import hypot, sqrt
from statistics import median
from typing import NamedTuple

from cache.types import Phase, Tier

CHUNK_BYTES = 4 * 2**20
"""What an urgent transfer may have to wait for: the part of a prefetch that is moved in one go."""


class PassTime(NamedTuple):
    """Where the seconds of one forward pass went."""

    phase: Phase
    seconds: float
    compute_s: float
    """Computing experts, waiting not included."""
    stall_s: float
    """Waiting for experts with nothing else to compute."""
    layers: int
    experts: float
    """Computed, each once for every event that needs it."""
    read: float
    """Experts read from disk, and for how long the disk was at it."""
    read_s: float
    copied: float
    """Experts copied over the link, and for how long that was at it."""
    copied_s: float
    expert_s: float = 0.0
    """Of `compute_s`, the computing tier's products alone; 0.0 where that is not known."""
    host_s: float = 0.0
    """Computing experts on the CPU beside the accelerator."""


@dataclass(slots=True)
class Pace:
    """Averages over the latest passes, in seconds; None until something was measured.

    `expert_s` computes one expert, `dense_s` is a layer beside its experts, by phase; `fetch_s` is how long one expert
    takes on the channel that brings it from a tier: the disk, or the link behind host memory.
    """

    expert_s: dict[Phase, float] = field(default_factory=dict)
    dense_s: dict[Phase, float] = field(default_factory=dict)
    fetch_s: dict[Tier, float] = field(default_factory=dict)

    def update(self, time: PassTime) -> None:
        """Take one more pass into account; the latest counts a fifth."""
        if time.experts:
            _blend(self.expert_s, time.phase, time.compute_s / time.experts)
        dense_s = (time.seconds - time.compute_s - time.stall_s) / time.layers
        _blend(self.dense_s, time.phase, max(dense_s, 0.0))
        if time.read:
            _blend(self.fetch_s, Tier.DISK, time.read_s / time.read)
        if time.copied:
            _blend(self.fetch_s, Tier.CPU, time.copied_s / time.copied)


def _blend(averages: dict[Phase, float] | dict[Tier, float], key: Phase | Tier, value: float) -> None:
    known: dict[Phase | Tier, float] = averages  # type: ignore[assignment]
    known[key] = value if key not in known else known[key] + 0.2 * (value - known[key])


_BLOCKS, _BLOCK = 4, 4  # a trial: blocks of so many passes, off and on by turns; the first pass of each does not count
_HOLD = 256, 64  # passes after a trial that left it on, and off


@dataclass(slots=True)
class Switch:
    """Whether prefetching pays, found out by trying: some decoding passes without it, some with it, by turns.

    What a model of costs leaves out (contention for memory, a disk that other programs use) is in the seconds of a
    pass. Passes differ in what they miss by more than prefetching gains, so it stays on unless it is slower by more
    than such differences explain: by one standard error. The first trial comes after `warm_up` passes.
    """

    warm_up: int = 8
    on: bool = True
    gain: float | None = None
    """By how much a pass was shorter with prefetching than without, in the last trial, as a share."""
    _left: int = field(default=0, init=False)
    _block: int = field(default=-1, init=False)
    _seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []), init=False)

    def __post_init__(self) -> None:
        self._left = self.warm_up

    def passed(self, seconds: float) -> None:
        """One more decoding pass took so long."""
        if self._block >= 0 and self._left < _BLOCK:
            self._seconds[self.on].append(seconds)
        self._left -= 1
        if self._left > 0:
            return
        self._block += 1
        if self._block < _BLOCKS:
            self.on, self._left = self._block % 2 == 1, _BLOCK
            return
        off, on = self._seconds
        without, with_it = median(off), median(on)
        self.gain = 1 - with_it / without if without else 0.0
        self.on = with_it - without <= hypot(_error(off), _error(on))
        self._seconds = [], []
        self._block, self._left = -1, _HOLD[not self.on]


def _error(values: Sequence[float]) -> float:
    """The standard error of their median, by their median deviation from it: one slow pass makes no difference."""
    middle = median(values)
    spread = 1.4826 * median(abs(value - middle) for value in values)
    return 1.2533 * spread / sqrt(len(values))
