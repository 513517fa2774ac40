"""The runtime behind the hook: routing in, the manager's plans carried out, experts handed out where their weights are.

It waits for transfers, hands work to the CPU beside an accelerator, and tells the manager where a pass's time went.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from cache.types import ExpertKey, Tier
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.decide.manager import Manager
from offload.decide.plan import Fetch, LayerPlan
from offload.engine.events import Events
from offload.engine.host import HostWorker, Job
from offload.engine.mending import in_order, start_over
from offload.engine.pass_clock import PassClock
from offload.engine.protocols import HANDLE, Fused, Group, Observer, OnHost, Recorder
from offload.engine.transfer import Transfer, TransferEngine
from offload.engine.views import Views
from offload.store.base import ExpertStore


class ExpertRuntime(Events):
    """Turns routing into events, asks the manager, and carries its plans out.

    `host` computes what plans give to the CPU beside an accelerator. After an error that was not foreseen nobody knows
    what is left undone: then all starts over, before anything else.
    """

    def __init__(
        self,
        experts: ExpertMap,
        store: ExpertStore,
        manager: Manager,
        engine: TransferEngine,
        host: HostWorker | None = None,
    ) -> None:
        super().__init__()
        self.manager = manager
        self.engine = engine
        self.host = host
        self.recorder: Recorder | None = None
        self.observer: Observer | None = None
        self.fused: Fused | None = None  # asked first for every layer, if there is one; see there
        self.refill: Callable[[], object] = lambda: None  # brings back what is in memory from the start
        self._sound = True  # whether whatever moved experts last came to an end that was foreseen
        self._foreseen: BaseException | None = None
        self._served = 0  # members of an event
        self._layers = experts.layers
        self._stall_before = 0.0
        self._clock = PassClock()
        self._slices = [precision.slices for precision in store.precisions]
        self._views = Views(store, experts)
        self.weights = self._views.weights

    def attach(self, model: nn.Module) -> None:
        """Give every experts module of `model` its handle, and `model` the runtime's way of being copied: none."""
        object.__setattr__(model, "__reduce_ex__", self.__reduce_ex__)
        for layer in self._layers:
            object.__setattr__(model.get_submodule(layer.path), HANDLE, (self, layer))

    def detach(self, model: nn.Module) -> None:
        """Take both back; the modules are as they were."""
        object.__delattr__(model, "__reduce_ex__")
        for layer in self._layers:
            object.__delattr__(model.get_submodule(layer.path), HANDLE)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a model whose experts are offloaded cannot be copied or pickled: load it once more")

    def close(self) -> None:
        """Forget every view, so that the slots' memory can be given back."""
        self._views.clear()
        if self.fused is not None:
            self.fused.close()

    @property
    def stall_s(self) -> float:
        """Seconds spent waiting for experts with nothing else to compute, since loading or `reset_stats`."""
        return self.engine.stall_s - self._stall_before

    def reset_stats(self) -> None:
        """Count from zero."""
        self.manager.reset_stats()
        self._stall_before = self.engine.stall_s

    def run(
        self,
        layer: ExpertLayer,
        experts: list[int],
        weights: list[float],
        tokens: list[int],
        on_host: OnHost | None = None,
        *,
        together: bool = False,
    ) -> Generator[Group, None, None]:
        """One event: yields groups of (expert, parameters), residents first, then the others as they land.

        The parameters of one group are valid until the next is asked for. `weights` and `tokens` are totals per expert.
        With `together`, all residents of one precision are one group; any other expert is a group of its own. What the
        CPU is to compute beside the accelerator is not yielded: `on_host` makes the work of it, on the calling thread,
        and all of it is done when this ends. When the caller stops early, or a transfer fails, what is under way is
        still received and nothing stays pinned. Raises TransferError, and what a policy raises.
        """
        self.mend()
        self._sound, self._foreseen, self._served = False, None, 0
        event = self.make(layer.index, experts, weights, tokens)
        self._received_all(self.engine.landed_meanwhile())
        start_s, stalled_s = time.perf_counter(), self.engine.stall_s
        plan = self.manager.step(event)
        late, waited_s = plan.late_fetches, self._clock.host_wait_s
        landed: dict[ExpertKey, list[Transfer]] = {}
        try:
            self._fetch(plan)
            if plan.error is not None:
                raise self._foresaw(plan.error)
            for key in plan.in_place() if plan.on_cpu else ():
                self._start(layer, plan, key, self._slots(key, plan, ()), on_host)
            for group in self._groups(layer, plan, together=together):
                # What has landed goes first: it may be in a staging slot, which the next read waits for.
                yield from self._as_they_land(layer, plan, landed, self.engine.landed_meanwhile(), on_host)
                begun_s = time.perf_counter()
                yield group
                self._served += len(group)
                self._clock.expert_s += time.perf_counter() - begun_s
            self.engine.submit(late)
            late = []
            yield from self._as_they_land(layer, plan, landed, self.engine.landed(), on_host)
            self._join()
            if self._served + len(plan.skipped) != len(event.experts):
                raise RuntimeError(f"of {len(event.experts)} experts of {layer.path} only {self._served} came")
            self.manager.finish()
            self._sound = True
        except BaseException as error:
            if isinstance(error, GeneratorExit) or error is self._foreseen:
                self._give_up(plan, late, landed)
            elif plan.error is not None:  # of which this one is a consequence
                raise plan.error from error
            raise
        finally:
            self._foreseen = None
            waited_s = self.engine.stall_s - stalled_s + self._clock.host_wait_s - waited_s
            self._clock.compute_s += time.perf_counter() - start_s - waited_s
            self._clock.computed += len(event.experts) - len(plan.on_cpu)

    def _fetch(self, plan: LayerPlan) -> None:
        if plan.awaited:  # of several slices on their way only those that the chosen precision takes
            self.engine.await_((key, slice_) for key in plan.awaited for slice_ in plan.waiting[key])
        self.engine.submit(plan.fetches)
        for fetch in plan.cancelled:
            if self.engine.cancel(fetch):
                self.manager.cancelled(fetch)
        self.engine.prefetch(plan.prefetches)

    def _give_up(self, plan: LayerPlan, late: Sequence[Fetch], landed: Mapping[ExpertKey, Sequence[Transfer]]) -> None:
        """End an event before its time: receive what is under way, and pin nothing."""
        for transfers in landed.values():
            self._release(transfers)
        self.engine.submit(late)
        self._received_all(self.engine.landed())
        with suppress(Exception):  # after another one
            self._join()
        self.manager.finish()
        if plan.error is not None:  # the manager was in the midst of something
            self._received_all(self.engine.settled())
        self._sound = plan.error is None or in_order(self.manager, self.engine)

    def _foresaw(self, error: BaseException) -> BaseException:
        """To be raised: after it `_give_up` is all that is to do."""
        self._foreseen = error
        return error

    def mend(self) -> None:
        """Before anything else after an error that was not foreseen: start over, with empty caches."""
        if not self._sound:
            start_over(self)
            self._sound = True

    def settle(self) -> None:
        """Between passes: wait until nothing is on its way."""
        self.mend()
        self._sound = False
        self._received_all(self.engine.settled())
        self._sound = True

    def passed(self, seconds: float, *, complete: bool) -> None:
        """A forward pass took so long: tell the manager where its time went, unless it failed before its end."""
        if complete and self.fused is not None:
            self.fused.flush()
        time = self._clock.passed(self.engine, self.host, self.phase, seconds, len(self._layers))
        if complete:
            self.manager.passed(time)

    def _groups(self, layer: ExpertLayer, plan: LayerPlan, *, together: bool) -> Iterator[Group]:
        """What is resident: all of a precision `together`, or each by itself."""
        slot, tier = self.engine.slot, self.manager.computing.tier
        groups: dict[int, Group] = {}
        for key in plan.resident:
            precision, used = plan.precision(key), plan.computed_as(key)
            slots = [slot(tier, used, slice_) for slice_ in self._slices[precision]]
            member = key.expert, self.weights(layer, precision, slots)
            if together:
                groups.setdefault(precision, []).append(member)
            else:
                yield [member]
        yield from groups.values()

    def _start(
        self,
        layer: ExpertLayer,
        plan: LayerPlan,
        key: ExpertKey,
        slots: Sequence[torch.Tensor],
        on_host: OnHost | None,
        after: Job | None = None,
    ) -> None:
        """Let the CPU compute an expert beside the accelerator."""
        if self.host is None or on_host is None:
            raise RuntimeError(f"{key} is for the CPU, and there is no thread to compute it")
        weights = self.weights(layer, plan.precision(key), slots)
        try:
            job = on_host(key.expert, weights)
        except Exception as error:
            raise self._foresaw(error) from None
        self.host.start(job, after)
        self._served += 1

    def _join(self) -> None:
        if self.host is not None and self.host.started:
            start = time.perf_counter()
            try:
                self.host.join()
            except Exception as error:
                raise self._foresaw(error) from None
            finally:
                self._clock.host_wait_s += time.perf_counter() - start

    def _as_they_land(
        self,
        layer: ExpertLayer,
        plan: LayerPlan,
        landed: dict[ExpertKey, list[Transfer]],
        transfers: Iterator[Transfer],
        on_host: OnHost | None,
    ) -> Iterator[Group]:
        """What of `transfers` this event computes. `landed` keeps those of experts that wait for another slice."""
        for transfer in transfers:
            if not transfer.urgent:  # a prefetch that fails is tried again when it is needed
                self._received(transfer)
                continue
            if transfer.error is not None:
                self._received(transfer)
                raise self._foresaw(transfer.error)
            fetch = transfer.fetch
            self.manager.arrived(fetch, transfer.bytes_from_disk)
            mine = landed.setdefault(fetch.key, [])
            mine.append(transfer)
            if len(mine) < len(plan.waiting[fetch.key]):
                continue
            slots = self._slots(fetch.key, plan, mine)
            if fetch.to_host:
                self._start(layer, plan, fetch.key, slots, on_host, partial(self._release, mine))
                del landed[fetch.key]
                continue
            begun_s = time.perf_counter()
            yield [(fetch.key.expert, self.weights(layer, plan.precision(fetch.key), slots))]
            self._clock.expert_s += time.perf_counter() - begun_s
            self._served += 1
            self._release(landed.pop(fetch.key))

    def _release(self, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            self.engine.release(transfer)

    def _slots(self, key: ExpertKey, plan: LayerPlan, landed: Sequence[Transfer]) -> list[torch.Tensor]:
        """Where the slices of an expert lie: those that have just landed, and those that its tier held."""
        here = {transfer.fetch.slice: transfer.computing_slot for transfer in landed}
        tier = Tier.CPU if key in plan.on_cpu else self.manager.stacks.computing
        slices = self._slices[plan.precision(key)]
        return [here[slice_] if slice_ in here else self.engine.slot(tier, key, slice_) for slice_ in slices]

    def _received_all(self, transfers: Iterator[Transfer]) -> None:
        for transfer in transfers:
            self._received(transfer)

    def _received(self, transfer: Transfer) -> None:
        """Note how a transfer ended that nobody computes with now."""
        if transfer.error is None:
            self.manager.arrived(transfer.fetch, transfer.bytes_from_disk)
        else:
            self.manager.failed(transfer.fetch)
        self.engine.release(transfer)
