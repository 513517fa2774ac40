"""The simulated engine: times plans as `offload/engine/` carries them out.

Disk and link are a channel each that works whenever it has something to do, as `offload/engine/transfer.py` does it:
what is urgent first, what was prefetched in chunks, after each of which something urgent may overtake it. Every slice
travels by itself, at its own size. Time moves where the processor moves it: the dense part of a layer, its residents,
its arrivals, and the waiting for them. Where a scheduler divides a layer, the CPU computes its share beside that, one
expert after the other, and the layer waits for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from cache.types import ExpertKey, RoutingEvent, Tier
from offload.costs.model import CostModel
from offload.decide.pace import PassTime
from offload.decide.plan import Fetch, LayerPlan
from offload.simulation.alone import EventTime, time_event
from offload.simulation.channels import Channel, Job

_REMEMBERED = 4096
"""Kinds of events whose times are remembered: decoding, every expert has one token, and a few kinds make up nearly
all."""


class SimulatedEngine:
    """`computing` is the tier that computes, `top_k` the experts a token goes to.

    `cost` is of experts at the model's own precision, and of all that is no expert. Where experts have several slices
    or precisions, `sizes` are the slices' bytes, and `compute` the costs of computing at each precision.
    """

    def __init__(
        self,
        cost: CostModel,
        computing: Tier,
        top_k: int = 1,
        *,
        compute: Sequence[CostModel] = (),
        sizes: Sequence[int] = (),
    ) -> None:
        self._cost = cost
        self._compute_at = list(compute) or [cost]
        self._sizes = list(sizes) or [cost.expert_bytes]
        self._computing = computing
        self._top_k = top_k
        self._now_s = 0.0
        self._residents = False  # whether the event under way has something to compute meanwhile
        self._disk = Channel(self._read_s)
        self._link = Channel(self._copy_s)
        self._landed: list[tuple[float, Fetch]] = []
        self._jobs: dict[tuple[ExpertKey, int], Job] = {}  # by expert and slice: of what has not landed, its latest
        self._compute_s = self._stall_s = self._host_s = 0.0
        self._host_free_s = 0.0  # when the CPU has computed its share, where layers are divided
        self._experts = 0
        self._read = self._copied = 0.0  # in first slices
        self._before = self._totals()
        self._whole = self._sizes == [cost.expert_bytes]
        self._alone = lru_cache(maxsize=_REMEMBERED)(self._time_alone)
        self._dense = lru_cache(maxsize=_REMEMBERED)(self._dense_s)

    def event_s(self, tokens: int, top_k: int, hits: int, misses: int, copies: int = 0) -> tuple[float, float]:
        """(seconds, of which stalled) of an event of so many tokens, spread evenly, that has the machine to itself:
        `copies` of the misses come from host memory, the others from the disk."""
        each = max(round(tokens * top_k / (hits + misses)), 1)
        sources = (Tier.CPU,) * copies + (Tier.DISK,) * (misses - copies)
        time = self._time_alone((each,) * hits, sources, (each,) * misses, misses)
        return self._cost.layer_s(tokens, hits + misses) + time.seconds, time.stall_s

    def begin_pass(self) -> float:
        """What a pass takes beside its layers."""
        seconds = self._cost.pass_s()
        self._now_s += seconds
        return seconds

    def begin(self, event: RoutingEvent) -> tuple[float, list[Fetch]]:
        """The dense part before the event: (its seconds, what landed until it was done)."""
        seconds = self._dense(sum(event.tokens) + event.dropped, len(event.tokens))
        self._now_s += seconds
        if not (self._jobs or self._landed):
            return seconds, []
        self._advance(self._now_s)
        landed = [fetch for at_s, fetch in sorted(self._landed, key=lambda item: item[0]) if at_s <= self._now_s]
        self._landed = [(at_s, fetch) for at_s, fetch in self._landed if at_s > self._now_s]
        return seconds, landed

    def run(self, plan: LayerPlan, cancelled: Callable[[Fetch], None]) -> tuple[float, float, list[Fetch]]:
        """(seconds of the event, of which stalled, fetches in order of landing). Tells `cancelled` what was taken
        back."""
        if self._whole and not (
            self._jobs or self._landed or plan.prefetches or plan.cancelled or plan.on_cpu or plan.replaced
        ):
            return self._run_alone(plan)
        tokens = dict(zip(plan.event.experts, plan.event.tokens, strict=True))
        start_s = self._now_s
        self._residents = bool(plan.resident)
        waiting = {key: set(slices) for key, slices in plan.waiting.items()}
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
                self._compute_on_host(tokens[key.expert], plan.precision(key), self._now_s)
        for key in plan.resident:
            self._compute(tokens[key.expert], plan.precision(key))
        self._submit(plan.late_fetches, urgent=True)
        received, stalled_s = self._as_they_land(plan, waiting, tokens)
        if plan.on_cpu:
            stalled_s += self._wait_until(self._host_free_s)
        self._stall_s += stalled_s
        return self._now_s - start_s, stalled_s, received

    def _as_they_land(
        self, plan: LayerPlan, waiting: dict[ExpertKey, set[int]], tokens: dict[int, int]
    ) -> tuple[list[Fetch], float]:
        """(what landed until every member that waited had all its slices and was computed, seconds stalled)."""
        received: list[Fetch] = []
        stalled_s = 0.0
        on_cpu = set(plan.on_cpu)
        while waiting:
            while not self._landed:
                self._work_once()
            self._landed.sort(key=lambda item: item[0])
            at_s, fetch = self._landed.pop(0)
            received.append(fetch)
            key = fetch.key
            if fetch.slice not in waiting.get(key, ()):
                continue
            waiting[key].discard(fetch.slice)
            if waiting[key]:
                continue
            del waiting[key]
            if key in on_cpu:
                self._compute_on_host(tokens[key.expert], plan.precision(key), at_s)
                continue
            stalled_s += self._wait_until(at_s)
            self._compute(tokens[key.expert], plan.precision(key))
        return received, stalled_s

    def _run_alone(self, plan: LayerPlan) -> tuple[float, float, list[Fetch]]:
        event = plan.event
        early = len(plan.fetches)
        fetches = [*plan.fetches, *plan.late_fetches] if plan.late_fetches else plan.fetches
        sources = tuple([fetch.source for fetch in fetches])
        if sum(event.tokens) == len(event.tokens):
            time = self._alone((1,) * len(plan.resident), sources, (1,) * len(fetches), early)
        else:
            tokens = dict(zip(event.experts, event.tokens, strict=True))
            residents = tuple([tokens[expert] for _, expert in plan.resident])
            time = self._alone(residents, sources, tuple([tokens[fetch.key.expert] for fetch in fetches]), early)
        self._now_s += time.seconds
        self._stall_s += time.stall_s
        self._compute_s += time.compute_s
        self._experts += len(plan.resident) + len(fetches)
        self._disk.busy_s += time.read_s
        self._link.busy_s += time.copied_s
        self._read += time.reads
        self._copied += time.copies
        return time.seconds, time.stall_s, [fetches[i] for i in time.landed]

    def _dense_s(self, pairs: int, experts: int) -> float:
        return self._cost.layer_s(pairs // self._top_k, experts)

    def _time_alone(
        self, residents: tuple[int, ...], sources: tuple[Tier, ...], fetched: tuple[int, ...], early: int
    ) -> EventTime:
        return time_event(self._cost, self._compute_at[0], self._computing, residents, sources, fetched, early)

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

    def _compute(self, tokens: int, precision: int) -> None:
        self._advance(self._now_s)
        reading = bool(self._disk.jobs) or self._now_s < self._disk.free_s
        seconds = self._compute_at[precision].expert_s(self._computing, tokens, reading=reading)
        self._now_s += seconds
        self._compute_s += seconds
        self._experts += 1

    def _compute_on_host(self, tokens: int, precision: int, ready_s: float) -> None:
        """One expert on the CPU beside the accelerator, behind those it has, when its bytes are there."""
        seconds = self._compute_at[precision].expert_s(Tier.CPU, tokens)
        self._host_free_s = max(self._host_free_s, ready_s) + seconds
        self._host_s += seconds

    def _wait_until(self, at_s: float) -> float:
        """Seconds that the processor of the computing tier stands still."""
        waited_s = max(at_s - self._now_s, 0.0)
        self._now_s += waited_s
        return waited_s

    def _copy_s(self, job: Job, alone: bool) -> float:
        return self._cost.link_s(job.nbytes, computing=self._now_s < self._host_free_s)

    def _read_s(self, job: Job, alone: bool) -> float:
        return self._cost.read_s(job.nbytes, alone=alone, computing=self._residents or not job.urgent)

    def _submit(self, fetches: list[Fetch], *, urgent: bool) -> None:
        self._advance(self._now_s)
        for fetch in fetches:
            nbytes = self._sizes[fetch.slice]
            if fetch.source is Tier.DISK:
                nbytes = round(nbytes * self._cost.record_bytes / self._cost.expert_bytes)
            job = self._jobs[fetch.key, fetch.slice] = Job(fetch, urgent, nbytes, nbytes, self._now_s)
            (self._disk if fetch.source is Tier.DISK else self._link).jobs.append(job)

    def _take_back(self, fetch: Fetch) -> bool:
        job = self._jobs.get((fetch.key, fetch.slice))
        channel = self._disk if fetch.source is Tier.DISK else self._link
        if job is None or job.fetch is not fetch or job.bytes_per_s or job not in channel.jobs:
            return False
        channel.jobs.remove(job)
        del self._jobs[fetch.key, fetch.slice]
        return True

    def _advance(self, until_s: float) -> None:
        """Let both channels do what they begin before `until_s`."""
        while (first := self._first()) is not None and first[0] < until_s:
            self._work(*first)

    def _first(self) -> tuple[float, Job, Channel] | None:
        """Which channel goes on first, when and with what."""
        disk, link = self._disk, self._link
        read = disk.next() if disk.jobs else None
        copied = link.next() if link.jobs else None
        if read is not None and (copied is None or read[0] <= copied[0]):
            return (*read, disk)
        return None if copied is None else (*copied, link)

    def _work_once(self) -> None:
        first = self._first()
        if first is None:
            raise RuntimeError("waiting for a transfer that was never begun")
        self._work(*first)

    def _work(self, start_s: float, job: Job, channel: Channel) -> None:
        if not channel.work(start_s, job):
            return
        fetch = job.fetch
        nbytes = self._sizes[fetch.slice]
        share = nbytes / self._sizes[0]
        if channel is self._disk:
            self._read += share
            if self._computing is not Tier.CPU and not fetch.to_host:
                onward = Job(fetch, job.urgent, nbytes, nbytes, channel.free_s)
                self._jobs[fetch.key, fetch.slice] = onward
                self._link.jobs.append(onward)
                return
        else:
            self._copied += share
        del self._jobs[fetch.key, fetch.slice]
        self._landed.append((channel.free_s, job.fetch))
