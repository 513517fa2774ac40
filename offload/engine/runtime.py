"""The runtime behind the hook: routing in, the manager's plans carried out, experts handed out where their weights are.

It waits for transfers, hands what the CPU computes beside an accelerator to its thread, and tells the manager where the
time of a pass went.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cache.traces.passes import Ahead, mean_scores, rank_ahead
from cache.types import ExpertKey, Phase, RoutingEvent, Tier
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.decide.manager import Manager
from offload.decide.pace import PassTime
from offload.decide.plan import LayerPlan
from offload.engine.host import HostWorker, Job
from offload.engine.transfer import Transfer, TransferEngine
from offload.layers.router import half_precision
from offload.store.base import ExpertStore, Weights

if TYPE_CHECKING:
    from offload.engine.fused.experts import FusedExperts

HANDLE = "_offload_layer"
"""Where an experts module keeps its runtime and layer."""

Observer = Callable[[int, int, torch.Tensor, torch.Tensor, torch.Tensor], object]
"""Is told what an expert gave: layer, expert, its output [M, H] before it is weighted, the weights [M], and which
tokens of the layer's input they are [M]."""


Group = list[tuple[int, Weights]]
"""Experts that are there, at one precision, with their parameters."""

OnHost = Callable[[int, Weights], Job]
"""Makes, of an expert and its parameters in host memory, the work that the CPU does beside the accelerator."""


class Recorder(Protocol):
    """Is told what runs while it is there; `offload.traces.recorder.TraceRecorder` is one."""

    def begin_generation(self, prompt_tokens: int, config: Any, kwargs: Mapping[str, Any]) -> None: ...

    def end_generation(self) -> None: ...

    def begin_pass(self, ids: torch.Tensor, mask: Any, length: int, phase: Phase) -> None: ...

    def record(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None: ...

    def end_pass(self, complete: bool) -> None: ...


class _Clock(NamedTuple):
    """Everything that was timed or counted, since the start or during one pass; names as in `PassTime`."""

    compute_s: float
    experts: float
    stall_s: float
    read: float
    read_s: float
    copied: float
    copied_s: float
    expert_s: float
    host_s: float


class ExpertRuntime:
    """Turns routing into events, asks the manager, and carries its plans out.

    The model sets `sequence`, `step` and `phase` before each forward pass. `host` computes what plans give to the CPU
    beside an accelerator.
    """

    def __init__(
        self,
        experts: ExpertMap,
        store: ExpertStore,
        manager: Manager,
        engine: TransferEngine,
        host: HostWorker | None = None,
    ) -> None:
        self.manager = manager
        self.engine = engine
        self.host = host
        self.sequence = 0
        self.step = 0
        self.phase = Phase.PREFILL
        self.recorder: Recorder | None = None
        self.observer: Observer | None = None
        self.fused: FusedExperts | None = None
        """Asked first for every layer, if there is one; see there."""
        self._scores: dict[int, NDArray[np.float32]] = {}
        self._ahead: dict[int, Ahead] = {}
        self._layers = experts.layers
        self._stall_before = 0.0
        self._compute_s = 0.0
        self._expert_s = 0.0
        self._host_wait_s = 0.0
        self._computed = 0
        self._clock = _Clock(*[0.0] * 9)
        self._store = store
        self._slices = [precision.slices for precision in store.precisions]
        # Making a tensor view costs microseconds, so each slot's are kept: one set for all layers that look alike.
        layouts: dict[Hashable, int] = {}
        self._layout = [layouts.setdefault(store.layout(layer.index), len(layouts)) for layer in experts.layers]
        self._views: dict[tuple[int, int, int], Weights] = {}

    def attach(self, model: nn.Module) -> None:
        """Give every experts module of `model` its handle."""
        for layer in self._layers:
            object.__setattr__(model.get_submodule(layer.path), HANDLE, (self, layer))

    def detach(self, model: nn.Module) -> None:
        """Take the handles back; the modules are as they were."""
        for layer in self._layers:
            object.__delattr__(model.get_submodule(layer.path), HANDLE)

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

    def receive_scores(self, layer: int, scores: torch.Tensor) -> None:
        """The router's scores [tokens, experts] for the event to come, rounded as a trace keeps them."""
        rows = half_precision(scores)
        self._scores[layer] = mean_scores(rows, np.array([len(rows)]))[0]

    def receive_ahead(self, layer: int, predicted: NDArray[np.unsignedinteger[Any]]) -> None:
        """What the next gates say ahead [tokens, D, P] of the event to come."""
        self._ahead[layer] = rank_ahead(predicted)

    def weights(self, layer: ExpertLayer, precision: int, slots: Sequence[torch.Tensor]) -> Weights:
        """The expert whose slices are in `slots` (uint8) as the layer's parameters."""
        if len(slots) > 1:  # too many pairs of slots to keep
            return self._store.weights(layer.index, precision, slots)
        key = self._layout[layer.index], precision, slots[0].data_ptr()
        if key not in self._views:
            self._views[key] = self._store.weights(layer.index, precision, slots)
        return self._views[key]

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
        members = sorted(zip(weights, experts, tokens, strict=True))
        weights_, experts_, tokens_ = zip(*members, strict=True)
        event = RoutingEvent(
            self.sequence,
            self.step,
            layer.index,
            self.phase,
            experts_,
            weights_,
            tokens_,
            ahead=self._ahead.pop(layer.index, ()),
            scores=self._scores.pop(layer.index, None),
        )
        for transfer in self.engine.landed_meanwhile():
            self._received(transfer)
        start_s, stalled_s = time.perf_counter(), self.engine.stall_s
        plan = self.manager.step(event)
        late = plan.late_fetches
        waited_s = self._host_wait_s
        landed: dict[ExpertKey, list[Transfer]] = {}
        try:
            # Of several slices on their way, only those that the chosen precision takes are waited for.
            if plan.awaited:
                self.engine.await_((key, slice_) for key in plan.awaited for slice_ in plan.waits_for(key) or (0,))
            self.engine.submit(plan.fetches)
            for fetch in plan.cancelled:
                if self.engine.cancel(fetch):
                    self.manager.cancelled(fetch)
            self.engine.prefetch(plan.prefetches)
            if plan.error is not None:
                raise plan.error
            for key in plan.in_place() if plan.on_cpu else ():
                self._start(layer, key, self.engine.slot(Tier.CPU, key), on_host)
            for group in self._groups(layer, plan, together=together):
                # What has landed goes first: it may be in a staging slot, which the next read waits for.
                yield from self._as_they_land(layer, plan, landed, self.engine.landed_meanwhile(), on_host)
                begun_s = time.perf_counter()
                yield group
                self._expert_s += time.perf_counter() - begun_s
            self.engine.submit(late)
            late = []
            yield from self._as_they_land(layer, plan, landed, self.engine.landed(), on_host)
            self._join()
        finally:
            for transfers in landed.values():
                for transfer in transfers:
                    self.engine.release(transfer)
            self.engine.submit(late)
            for transfer in self.engine.landed():
                self._received(transfer)
            with suppress(Exception):  # after another one
                self._join()
            self.manager.finish()
            waited_s = self.engine.stall_s - stalled_s + self._host_wait_s - waited_s
            self._compute_s += time.perf_counter() - start_s - waited_s
            self._computed += len(event.experts) - len(plan.on_cpu)

    def settle(self) -> None:
        """Between passes: wait until nothing is on its way."""
        for transfer in self.engine.settled():
            self._received(transfer)

    def passed(self, seconds: float) -> None:
        """A whole forward pass took so long: tell the manager where its time went."""
        if self.fused is not None:
            self.fused.flush()
        traffic = self.engine.traffic
        stall_s = self.engine.stall_s + self._host_wait_s
        expert_s = self._expert_s if self.engine.waits_for_products else 0.0
        host_s = 0.0 if self.host is None else self.host.busy_s
        now = _Clock(self._compute_s, self._computed, stall_s, *traffic.totals(), expert_s, host_s)
        spent = _Clock(*(after - before for after, before in zip(now, self._clock, strict=True)))
        self._clock = now
        self.manager.passed(
            PassTime(
                self.phase,
                seconds,
                spent.compute_s,
                spent.stall_s,
                len(self._layers),
                spent.experts,
                spent.read,
                spent.read_s,
                spent.copied,
                spent.copied_s,
                spent.expert_s,
                spent.host_s,
            )
        )

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
        self, layer: ExpertLayer, key: ExpertKey, slot: torch.Tensor, on_host: OnHost | None, after: Job | None = None
    ) -> None:
        """Let the CPU compute an expert beside the accelerator."""
        if self.host is None or on_host is None:
            raise RuntimeError(f"{key} is for the CPU, and there is no thread to compute it")
        self.host.start(on_host(key.expert, self.weights(layer, 0, [slot])), after)

    def _join(self) -> None:
        if self.host is not None and self.host.started:
            start = time.perf_counter()
            try:
                self.host.join()
            finally:
                self._host_wait_s += time.perf_counter() - start

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
                raise transfer.error
            fetch = transfer.fetch
            self.manager.arrived(fetch, transfer.bytes_from_disk)
            if fetch.to_host:
                release = partial(self.engine.release, transfer)
                try:
                    self._start(layer, fetch.key, transfer.computing_slot, on_host, release)
                except BaseException:
                    release()
                    raise
                continue
            landed.setdefault(fetch.key, []).append(transfer)
            slots = self._slots(fetch.key, plan, landed[fetch.key])
            if slots is None:
                continue
            begun_s = time.perf_counter()
            yield [(fetch.key.expert, self.weights(layer, plan.precision(fetch.key), slots))]
            self._expert_s += time.perf_counter() - begun_s
            for done in landed.pop(fetch.key):
                self.engine.release(done)

    def _slots(self, key: ExpertKey, plan: LayerPlan, landed: Sequence[Transfer]) -> list[torch.Tensor] | None:
        """Where the slices of an expert lie; None while one of them is on its way."""
        slices = self._slices[plan.precision(key)]
        here = {transfer.fetch.slice: transfer.computing_slot for transfer in landed}
        if len(slices) == 1:
            return [here[slices[0]]] if slices[0] in here else None
        if any(slice_ not in here for slice_ in plan.waits_for(key)):
            return None
        tier = self.manager.computing.tier
        return [here[slice_] if slice_ in here else self.engine.slot(tier, key, slice_) for slice_ in slices]

    def _received(self, transfer: Transfer) -> None:
        """Note how a transfer ended that nobody computes with now."""
        if transfer.error is None:
            self.manager.arrived(transfer.fetch, transfer.bytes_from_disk)
        else:
            self.manager.failed(transfer.fetch)
        self.engine.release(transfer)
