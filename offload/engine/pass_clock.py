"""Where the time of a forward pass went, as the runtime saw it."""

from __future__ import annotations

from typing import NamedTuple

from cache.types import Phase
from offload.decide.pace import PassTime
from offload.engine.host import HostWorker
from offload.engine.transfer import TransferEngine
from offload.formats.cpu import begun


class _Reading(NamedTuple):
    """Everything that was timed or counted since the start, or during one pass; names as in `PassTime`."""

    compute_s: float
    experts: float
    stall_s: float
    read: float
    read_s: float
    copied: float
    copied_s: float
    expert_s: float
    host_s: float


class PassClock:
    """The runtime adds to these as it goes; `passed` says what the pass since the last call took."""

    def __init__(self) -> None:
        self.compute_s = 0.0
        """From an event to its end, waiting not included."""
        self.expert_s = 0.0
        """Of that, what whoever computes experts took."""
        self.host_wait_s = 0.0
        """Waiting for what the CPU computes beside the accelerator."""
        self.computed = 0
        """Experts."""
        self._within_s: float | None = None  # what of a call that was begun its event's time has
        self._before = _Reading(*[0.0] * len(_Reading._fields))

    def begun(self, within_s: float) -> None:
        """An event's experts are computed by a call that was begun (`offload.formats.cpu.begun`), so long before the
        event's end."""
        self._within_s = within_s

    def count_begun(self) -> None:
        """That call is done."""
        if self._within_s is not None:
            lasted_s = begun.lasted_s()
            self.expert_s += lasted_s
            self.compute_s += max(lasted_s - self._within_s, 0.0)
            self._within_s = None

    def passed(
        self, engine: TransferEngine, host: HostWorker | None, phase: Phase, seconds: float, layers: int
    ) -> PassTime:
        """A whole pass took so long."""
        self.count_begun()
        expert_s = self.expert_s if engine.waits_for_products else 0.0
        host_s = 0.0 if host is None else host.busy_s
        stall_s = engine.stall_s + self.host_wait_s
        now = _Reading(self.compute_s, self.computed, stall_s, *engine.traffic.totals(), expert_s, host_s)
        spent = _Reading(*(after - before for after, before in zip(now, self._before, strict=True)))
        self._before = now
        return PassTime(phase, seconds, layers=layers, **spent._asdict())
