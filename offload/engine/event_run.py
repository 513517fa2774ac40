"""One event under way: its plan carried out, its experts handed out where their weights are.

It fetches, waits for transfers, and hands work to the CPU beside an accelerator.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

import torch

from cache.types import ExpertKey, Tier
from offload.checkpoint.layout import ExpertLayer
from offload.decide.manager import Manager
from offload.decide.plan import LayerPlan
from offload.engine.host import HostWorker, Job
from offload.engine.pass_clock import PassClock
from offload.engine.protocols import Group, OnHost
from offload.engine.transfer import Transfer, TransferEngine
from offload.store.base import Weights


class Means(Protocol):
    """What an event is carried out with: the parts of an `ExpertRuntime`, and how it makes weights of slots.

    `slices` are those of each precision.
    """

    manager: Manager
    engine: TransferEngine
    host: HostWorker | None
    clock: PassClock
    slices: Sequence[Sequence[int]]

    def weights(self, layer: ExpertLayer, precision: int, slots: Sequence[torch.Tensor]) -> Weights: ...


class EventRun:
    """Carries `plan` out, for one event of `layer`; what the CPU is to compute is made by `on_host`.

    `foreseen` says of an error that after it `give_up` is all that is to do.
    """

    def __init__(self, means: Means, layer: ExpertLayer, plan: LayerPlan, on_host: OnHost | None) -> None:
        self.foreseen = False
        self._means = means
        self._layer = layer
        self._plan = plan
        self._on_host = on_host
        self._late = plan.late_fetches
        self._landed: dict[ExpertKey, list[Transfer]] = {}  # of experts that wait for another slice
        self._served = 0  # members of the event

    def groups(self, *, together: int) -> Iterator[Group]:
        """The experts in groups, residents first, then the others as they land; see `ExpertRuntime.run`."""
        engine, plan, clock = self._means.engine, self._plan, self._means.clock
        self._fetch()
        if plan.error is not None:
            self.foreseen = True
            raise plan.error
        for key in plan.in_place() if plan.on_cpu else ():
            self._start(key, self._slots(key, ()))
        for group in self._residents(together):
            # What has landed goes first: it may be in a staging slot, which the next read waits for.
            yield from self._as_they_land(engine.landed_meanwhile())
            begun_s = time.perf_counter()
            yield group
            self._served += len(group)
            clock.expert_s += time.perf_counter() - begun_s
        engine.submit(self._late)
        self._late = []
        yield from self._as_they_land(engine.landed())
        self._join()
        members = len(plan.event.experts)
        if self._served + len(plan.skipped) != members:
            raise RuntimeError(f"of {members} experts of {self._layer.path} only {self._served} came")

    def give_up(self) -> None:
        """End before the time: receive what is under way, and keep no place."""
        engine = self._means.engine
        for transfers in self._landed.values():
            self._release(transfers)
        engine.submit(self._late)
        receive(self._means, engine.landed())
        with suppress(Exception):  # after another one
            self._join()

    def _fetch(self) -> None:
        engine, plan = self._means.engine, self._plan
        engine.drop(plan.dropped)
        if plan.awaited:  # of several slices on their way only those that the chosen precision takes
            engine.await_((key, slice_) for key in plan.awaited for slice_ in plan.waiting[key])
        engine.submit(plan.fetches)
        fetch_ahead(self._means, plan)

    def _residents(self, together: int) -> Iterator[Group]:
        """What is resident, up to so many of a precision `together`."""
        slot, tier, plan = self._means.engine.slot, self._means.manager.computing.tier, self._plan
        groups: dict[int, Group] = {}
        for key in plan.resident:
            precision, used = plan.precision(key), plan.computed_as(key)
            slots = [slot(tier, used, slice_) for slice_ in self._means.slices[precision]]
            group = groups.setdefault(precision, [])
            group.append((key.expert, self._means.weights(self._layer, precision, slots)))
            if len(group) == together:
                yield groups.pop(precision)
        yield from groups.values()

    def _as_they_land(self, transfers: Iterator[Transfer]) -> Iterator[Group]:
        """What of `transfers` this event computes."""
        means, plan = self._means, self._plan
        for transfer in transfers:
            if not transfer.urgent:  # a prefetch that fails is tried again when it is needed
                _received(means, transfer)
                continue
            if transfer.error is not None:
                _received(means, transfer)
                self.foreseen = True
                raise transfer.error
            fetch = transfer.fetch
            means.manager.arrived(fetch, transfer.bytes_from_disk)
            mine = self._landed.setdefault(fetch.key, [])
            mine.append(transfer)
            if len(mine) < len(plan.waiting[fetch.key]):
                continue
            slots = self._slots(fetch.key, mine)
            if fetch.to_host:
                self._start(fetch.key, slots, partial(self._release, mine))
                del self._landed[fetch.key]
                continue
            begun_s = time.perf_counter()
            yield [(fetch.key.expert, means.weights(self._layer, plan.precision(fetch.key), slots))]
            means.clock.expert_s += time.perf_counter() - begun_s
            self._served += 1
            self._release(self._landed.pop(fetch.key))

    def _start(self, key: ExpertKey, slots: Sequence[torch.Tensor], after: Job | None = None) -> None:
        """Let the CPU compute an expert beside the accelerator."""
        host, on_host = self._means.host, self._on_host
        if host is None or on_host is None:
            raise RuntimeError(f"{key} is for the CPU, and there is no thread to compute it")
        weights = self._means.weights(self._layer, self._plan.precision(key), slots)
        try:
            job = on_host(key.expert, weights)
        except Exception:
            self.foreseen = True
            raise
        host.start(job, after)
        self._served += 1

    def _join(self) -> None:
        host = self._means.host
        if host is not None and host.started:
            start = time.perf_counter()
            try:
                host.join()
            except Exception:
                self.foreseen = True
                raise
            finally:
                self._means.clock.host_wait_s += time.perf_counter() - start

    def _slots(self, key: ExpertKey, landed: Sequence[Transfer]) -> list[torch.Tensor]:
        """Where the slices of an expert lie: those that have just landed, and those that its tier held."""
        engine, plan = self._means.engine, self._plan
        here = {transfer.fetch.slice: transfer.computing_slot for transfer in landed}
        tier = Tier.CPU if key in plan.on_cpu else self._means.manager.stacks.computing
        slices = self._means.slices[plan.precision(key)]
        return [here[slice_] if slice_ in here else engine.slot(tier, key, slice_) for slice_ in slices]

    def _release(self, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            self._means.engine.release(transfer)


def fetch_ahead(means: Means, plan: LayerPlan) -> None:
    """Take back the prefetches that are not wanted any more, and begin the new ones."""
    for fetch in plan.cancelled:
        if means.engine.cancel(fetch):
            means.manager.cancelled(fetch)
    means.engine.prefetch(plan.prefetches)


def receive(means: Means, transfers: Iterator[Transfer]) -> None:
    """Note how transfers ended that nobody computes with now."""
    for transfer in transfers:
        _received(means, transfer)


def _received(means: Means, transfer: Transfer) -> None:
    if transfer.error is None:
        means.manager.arrived(transfer.fetch, transfer.bytes_from_disk)
    else:
        means.manager.failed(transfer.fetch)
    means.engine.release(transfer)
