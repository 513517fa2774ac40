"""The simulated clock where transfers outlive the event that began them: prefetching.

Disk and link are a channel each that works whenever it has something to do, as `offload/engine/transfer.py` does it:
what is urgent first, what was prefetched in chunks, after each of which something urgent may overtake it. Time moves
where the processor moves it: the dense part of a layer, its residents, its arrivals, and the waiting for them. Where a
scheduler divides a layer, the CPU computes its share beside that, one expert after the other, and the layer waits for
both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cache.types import ExpertKey, RoutingEvent, Tier
from offload.costs.model import CostModel
from offload.decide.pace import CHUNK_BYTES, PassTime
from offload.decide.plan import Fetch, LayerPlan


@dataclass(slots=True, eq=False)
class _Job:
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
class _Channel:
    """A serial channel. `seconds(job, alone)` is what the whole job takes, `alone` if the channel was idle before."""

    seconds: Callable[[_Job, bool], float]
    free_s: float = 0.0
    busy_s: float = 0.0
    jobs: list[_Job] = field(default_factory=list)

    def next(self) -> tuple[float, _Job] | None:
        """When the channel goes on, and with what: of what is ready by then, the urgent first, then in order."""
        if not self.jobs:
            return None
        start_s = max(self.free_s, min(job.ready_s for job in self.jobs))
        ready = [job for job in self.jobs if job.ready_s <= start_s]
        return start_s, next((job for job in ready if job.urgent), ready[0])

    def work(self, start_s: float, job: _Job) -> bool:
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


class OverlappingEngine:
    """Times plans with prefetches. `computing` is the tier that computes, `top_k` the experts a token goes to."""

    def __init__(self, cost: CostModel, computing: Tier, top_k: int) -> None:
        self._cost = cost
        self._computing = computing
        self._top_k = top_k
        self._now_s = 0.0
        self._residents = False  # whether the event under way has something to compute meanwhile
        self._disk = _Channel(self._read_s, free_s=-1.0)
        self._link = _Channel(self._copy_s, free_s=-1.0)
        self._landed: list[tuple[float, Fetch]] = []
        self._jobs: dict[tuple[ExpertKey, int], _Job] = {}  # by expert and slice: of what has not landed, its latest
        self._compute_s = self._stall_s = self._host_s = 0.0
        self._host_free_s = 0.0  # when the CPU has computed its share, where layers are divided
        self._experts = 0
        self._unit_bytes = cost.expert_bytes
        self._read = self._copied = 0.0  # in experts of that size
        self._before = self._totals()

    def begin_pass(self) -> float:
        """What a pass takes beside its layers."""
        seconds = self._cost.pass_s()
        self._now_s += seconds
        return seconds

    def begin(self, event: RoutingEvent) -> tuple[float, list[Fetch]]:
        """The dense part before the event: (its seconds, what landed until it was done)."""
        seconds = self._cost.layer_s(sum(event.tokens) // self._top_k, len(event.tokens))
        self._now_s += seconds
        self._advance(self._now_s)
        landed = [fetch for at_s, fetch in sorted(self._landed, key=lambda item: item[0]) if at_s <= self._now_s]
        self._landed = [(at_s, fetch) for at_s, fetch in self._landed if at_s > self._now_s]
        return seconds, landed

    def run(self, plan: LayerPlan, cancelled: Callable[[Fetch], None]) -> tuple[float, float, list[Fetch]]:
        """(seconds of the event, of which stalled, fetches in order of landing). Tells `cancelled` what was taken
        back."""
        start_s, stalled_s = self._now_s, 0.0
        tokens = dict(zip(plan.event.experts, plan.event.tokens, strict=True))
        self._residents = bool(plan.resident)
        waiting = self._waiting(plan)
        for key, slices in waiting.items():
            for slice_ in slices:
                if (key, slice_) in self._jobs:
                    self._jobs[key, slice_].urgent = True
        self._submit(plan.fetches, urgent=True)
        for fetch in plan.cancelled:
            if self._take_back(fetch):
                cancelled(fetch)
        self._submit(plan.prefetches, urgent=False)
        if plan.on_cpu:
            self._host_free_s = self._now_s + self._cost.cpu_start_s
            for key in plan.in_place():
                self._compute_on_host(tokens[key.expert], self._now_s)
        for key in plan.resident:
            self._compute(tokens[key.expert], self._cost_of(key, plan))
        self._submit(plan.late_fetches, urgent=True)
        received: list[Fetch] = []
        while waiting:
            while not self._landed:
                self._work_once()
            self._landed.sort(key=lambda item: item[0])
            at_s, fetch = self._landed.pop(0)
            received.append(fetch)
            if fetch.slice not in waiting.get(fetch.key, ()):
                continue
            waiting[fetch.key].discard(fetch.slice)
            if waiting[fetch.key]:
                continue
            del waiting[fetch.key]
            if fetch.to_host:
                self._compute_on_host(tokens[fetch.key.expert], at_s)
                continue
            stalled_s += self._wait_until(at_s)
            self._compute(tokens[fetch.key.expert], self._cost_of(fetch.key, plan))
        if plan.on_cpu:
            stalled_s += self._wait_until(self._host_free_s)
        self._stall_s += stalled_s
        return self._now_s - start_s, stalled_s, received

    def end_pass(self, event: RoutingEvent, seconds: float) -> PassTime:
        """Where the time of the pass went that ended with `event`."""
        now = self._totals()
        compute_s, stall_s, experts, read, read_s, copied, copied_s, host_s = (
            after - before for after, before in zip(now, self._before, strict=True)
        )
        self._before = now
        transfers = read, read_s, copied, copied_s
        return PassTime(
            event.phase, seconds, compute_s, stall_s, event.layer + 1, experts, *transfers, compute_s, host_s
        )

    def drain(self) -> list[Fetch]:
        """What is on its way, all of it landed: the pause between two sequences is long enough."""
        while self._jobs:
            self._work_once()
        landed = [fetch for _, fetch in self._landed]
        self._landed.clear()
        return landed

    def _totals(self) -> tuple[float, ...]:
        return (
            self._compute_s,
            self._stall_s,
            self._experts,
            self._read,
            self._disk.busy_s,
            self._copied,
            self._link.busy_s,
            self._host_s,
        )

    def _waiting(self, plan: LayerPlan) -> dict[ExpertKey, set[int]]:
        """The slices of each member that are not there yet: it is computed when the last of them has landed."""
        fetched = (fetch.key for fetch in (*plan.fetches, *plan.late_fetches))
        return {key: {0} for key in (*plan.awaited, *fetched)}

    def _cost_of(self, key: ExpertKey, plan: LayerPlan) -> CostModel:
        """What computing a member costs."""
        return self._cost

    def _compute(self, tokens: int, cost: CostModel) -> None:
        self._advance(self._now_s)
        reading = bool(self._disk.jobs) or self._now_s < self._disk.free_s
        seconds = cost.expert_s(self._computing, tokens, reading=reading)
        self._now_s += seconds
        self._compute_s += seconds
        self._experts += 1

    def _compute_on_host(self, tokens: int, ready_s: float) -> None:
        """One expert on the CPU beside the accelerator, behind those it has, when its bytes are there."""
        seconds = self._cost.expert_s(Tier.CPU, tokens)
        self._host_free_s = max(self._host_free_s, ready_s) + seconds
        self._host_s += seconds

    def _wait_until(self, at_s: float) -> float:
        """Seconds that the processor of the computing tier stands still."""
        waited_s = max(at_s - self._now_s, 0.0)
        self._now_s += waited_s
        return waited_s

    def _copy_s(self, job: _Job, alone: bool) -> float:
        return self._cost.link_s(job.nbytes, computing=self._now_s < self._host_free_s)

    def _read_s(self, job: _Job, alone: bool) -> float:
        return self._cost.read_s(job.nbytes, alone=alone, computing=self._residents or not job.urgent)

    def _submit(self, fetches: list[Fetch], *, urgent: bool) -> None:
        self._advance(self._now_s)
        for fetch in fetches:
            nbytes = self._bytes(fetch)
            job = self._jobs[fetch.key, fetch.slice] = _Job(fetch, urgent, nbytes, nbytes, self._now_s)
            (self._disk if fetch.source is Tier.DISK else self._link).jobs.append(job)

    def _take_back(self, fetch: Fetch) -> bool:
        job = self._jobs.get((fetch.key, fetch.slice))
        channel = self._disk if fetch.source is Tier.DISK else self._link
        if job is None or job.fetch is not fetch or job.bytes_per_s or job not in channel.jobs:
            return False
        channel.jobs.remove(job)
        del self._jobs[fetch.key, fetch.slice]
        return True

    def _bytes(self, fetch: Fetch) -> int:
        return self._cost.expert_bytes

    def _advance(self, until_s: float) -> None:
        """Let both channels do what they begin before `until_s`."""
        while (first := self._first()) is not None and first[0] < until_s:
            self._work_once()

    def _first(self) -> tuple[float, _Job, _Channel] | None:
        """Which channel goes on first, when and with what."""
        options = [(*found, channel) for channel in (self._disk, self._link) if (found := channel.next()) is not None]
        return min(options, key=lambda option: option[0], default=None)

    def _work_once(self) -> None:
        first = self._first()
        if first is None:
            raise RuntimeError("waiting for a transfer that was never begun")
        start_s, job, channel = first
        if not channel.work(start_s, job):
            return
        fetch, share = job.fetch, job.nbytes / self._unit_bytes
        if channel is self._disk:
            self._read += share
            if self._computing is not Tier.CPU and not fetch.to_host:
                onward = _Job(fetch, job.urgent, job.nbytes, job.nbytes, channel.free_s)
                self._jobs[fetch.key, fetch.slice] = onward
                self._link.jobs.append(onward)
                return
        else:
            self._copied += share
        del self._jobs[fetch.key, fetch.slice]
        self._landed.append((channel.free_s, job.fetch))
