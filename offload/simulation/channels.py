"""A serial channel under a simulated clock, a disk or a link: what is urgent first, the rest in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from offload.decide.pace import CHUNK_BYTES
from offload.decide.plan import Fetch


@dataclass(slots=True, eq=False)
class Job:
    """One slice of an expert on one channel: `left` of its `nbytes` still have to pass; `ready_s` is when that may
    begin."""

    fetch: Fetch
    urgent: bool
    nbytes: int
    left: int
    ready_s: float
    bytes_per_s: float = 0.0
    """0.0: it has not begun."""


@dataclass(slots=True)
class Channel:
    """A serial channel. `seconds(job, alone)` is what the whole job takes, `alone` if the channel was idle before."""

    seconds: Callable[[Job, bool], float]
    free_s: float = -1.0
    busy_s: float = 0.0
    jobs: list[Job] = field(default_factory=list)

    def next(self) -> tuple[float, Job] | None:
        """When the channel goes on, and with what: of what is ready by then, the urgent first, then in order."""
        first: Job | None = None
        for job in self.jobs:
            if job.ready_s <= self.free_s:
                if job.urgent:
                    return self.free_s, job
                first = job if first is None else first
        if first is not None:
            return self.free_s, first
        if not self.jobs:
            return None
        start_s = min(job.ready_s for job in self.jobs)
        ready = [job for job in self.jobs if job.ready_s <= start_s]
        return start_s, next((job for job in ready if job.urgent), ready[0])

    def work(self, start_s: float, job: Job) -> bool:
        """Move the next chunk of `job`, or all of it if it is urgent; says whether that was the last."""
        if not job.bytes_per_s:
            job.bytes_per_s = job.nbytes / max(self.seconds(job, start_s > self.free_s), 1e-12)
        nbytes = job.left if job.urgent else min(job.left, CHUNK_BYTES)
        taken_s = nbytes / job.bytes_per_s
        self.free_s = start_s + taken_s
        self.busy_s += taken_s
        job.left -= nbytes
        if job.left:
            return False
        self.jobs.remove(job)
        return True
