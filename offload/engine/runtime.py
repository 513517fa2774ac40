"""The runtime behind the hook: routing in, experts out, one event after the other.

It asks the manager for a plan, has it carried out, and tells where a pass's time went. After errors it puts all in
order again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cache.residency import State
from cache.types import ExpertKey
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.decide.manager import Manager
from offload.decide.plan import LayerPlan
from offload.engine.event_run import EventRun, fetch_ahead, receive
from offload.engine.events import Events
from offload.engine.host import HostWorker
from offload.engine.pass_clock import PassClock
from offload.engine.protocols import HANDLE, Fused, Group, Observer, OnHost, Recorder
from offload.engine.starting_over import in_order, start_over
from offload.engine.token import token_experts
from offload.engine.transfer import TransferEngine
from offload.engine.views import Views
from offload.layers.moe_block import compute_experts_by
from offload.layers.products import EXACT, Products
from offload.store.base import ExpertStore, Weights


class ExpertRuntime(Events):
    """Turns routing into events, asks the manager, and carries its plans out.

    `host` computes what plans give to the CPU beside an accelerator. `products` say how the CPU multiplies. After an
    error that was not foreseen nobody knows what is left undone: then all starts over, before anything else.
    """

    def __init__(
        self,
        experts: ExpertMap,
        store: ExpertStore,
        manager: Manager,
        engine: TransferEngine,
        host: HostWorker | None = None,
        products: Products = EXACT,
    ) -> None:
        super().__init__()
        self.manager = manager
        self.engine = engine
        self.host = host
        self.recorder: Recorder | None = None
        self.observer: Observer | None = None
        self.fused: Fused | None = None  # asked first for every layer, if there is one; see there
        self.own_rows = 0
        """Of up to how many tokens all large products run on threads of our own."""
        self.refill: Callable[[], object] = lambda: None  # brings back what is in memory from the start
        self.in_pass = False
        """Whether a forward pass is under way, at whose end what was begun is waited for."""
        self._near: dict[int, dict[int, Weights]] = {}  # residents by layer, as long as nothing moves
        self._near_since = 0  # that many of the engine's changes
        self._opened = (0, -1)  # the pass of which it is known what it reads
        self._sound = True  # whether whatever moved experts last came to an end that was foreseen
        self._layers = experts.layers
        self._stall_before = 0.0
        self.clock = PassClock()
        self.slices: Sequence[Sequence[int]] = [precision.slices for precision in store.precisions]
        self._views = Views(store, experts, products)
        self.weights = self._views.weights

    def attach(self, model: nn.Module) -> None:
        """Give every experts module of `model` its handle, and `model` the runtime's way of being copied: none."""
        object.__setattr__(model, "__reduce_ex__", self.__reduce_ex__)
        for layer in self._layers:
            object.__setattr__(model.get_submodule(layer.path), HANDLE, (self, layer))
        compute_experts_by(model, token_experts)

    def detach(self, model: nn.Module) -> None:
        """Take both back; the modules are as they were."""
        compute_experts_by(model, None)
        object.__delattr__(model, "__reduce_ex__")
        for layer in self._layers:
            object.__delattr__(model.get_submodule(layer.path), HANDLE)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a model whose experts are offloaded cannot be copied or pickled: load it once more")

    def close(self) -> None:
        """Forget every view, so that the slots' memory can be given back."""
        self._views.clear()
        self._near.clear()
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

    def receive_opening(self, ids: torch.Tensor, embeddings: NDArray[np.float16]) -> None:
        """The pass under way reads `ids` [tokens], whose sketches are `embeddings` [tokens, D]: before its first layer,
        fetch what is expected of it. Raises what a predictor raises."""
        if not self.manager.listens or self._opened == (self.sequence, self.step):
            return
        self._opened = self.sequence, self.step
        self.mend()
        event = self.open(ids, embeddings)
        self._sound = False
        receive(self, self.engine.landed_meanwhile())
        plan = self.manager.begin(event)
        fetch_ahead(self, plan)
        if plan.error is not None:
            self._given_up(plan)
            raise plan.error
        self._sound = True

    def run(
        self,
        layer: ExpertLayer,
        experts: list[int],
        weights: list[float],
        tokens: list[int],
        on_host: OnHost | None = None,
        *,
        together: int = 1,
    ) -> Generator[Group, None, None]:
        """One event: yields groups of (expert, parameters), residents first, then the others as they land.

        The parameters of one group are valid until the next is asked for. `weights` and `tokens` are totals per expert.
        Residents of one precision are groups of up to `together`; any other expert is a group of its own. What the
        CPU is to compute beside the accelerator is not yielded: `on_host` makes the work of it, on the calling thread,
        and all of it is done when this ends. When the caller stops early, or a transfer fails, what is under way is
        still received and nothing stays pinned. Raises TransferError, and what a policy raises.
        """
        self.mend()
        self._sound = False
        event = self.make(layer.index, experts, weights, tokens)
        receive(self, self.engine.landed_meanwhile())
        start_s, stalled_s = time.perf_counter(), self.engine.stall_s
        plan = self.manager.step(event)
        waited_s = self.clock.host_wait_s
        under_way = EventRun(self, layer, plan, on_host)
        try:
            yield from under_way.groups(together=together)
            self.manager.finish()
            self._sound = True
        except BaseException as error:
            if isinstance(error, GeneratorExit) or under_way.foreseen:
                under_way.give_up()
                self._given_up(plan)
            elif plan.error is not None:  # of which this one is a consequence
                raise plan.error from error
            raise
        finally:
            waited_s = self.engine.stall_s - stalled_s + self.clock.host_wait_s - waited_s
            self.clock.compute_s += time.perf_counter() - start_s - waited_s
            self.clock.computed += len(event.experts) - len(plan.on_cpu)

    def at_hand(self, layer: ExpertLayer, experts: Sequence[int]) -> Group | None:
        """These experts with their parameters, if the next event, which needs them, can only say: all where they lie.

        Nothing takes their places before the event after that one.
        """
        if not (self._sound and self.manager.uses_residents):
            return None
        if self._near_since != self.engine.changes:
            self._near, self._near_since = {}, self.engine.changes
        near = self._near.setdefault(layer.index, {})
        for expert in experts:
            if expert not in near:
                key, computing = ExpertKey(layer.index, expert), self.manager.computing
                if computing.state(key) is not State.RESIDENT:
                    return None
                near[expert] = self.weights(layer, 0, [self.engine.slot(computing.tier, key)])
        return [(expert, near[expert]) for expert in experts]

    def _given_up(self, plan: LayerPlan) -> None:
        """After an event that ended before its time: pin nothing, and see whether all is in order."""
        self.manager.finish()
        if plan.error is not None:  # the manager was in the midst of something
            receive(self, self.engine.settled())
        self._sound = plan.error is None or in_order(self.manager, self.engine)

    def mend(self) -> None:
        """Before anything else after an error that was not foreseen: start over, with empty caches."""
        if not self._sound:
            start_over(self)
            self._sound = True

    def settle(self) -> None:
        """Between passes: wait until nothing is on its way."""
        self.mend()
        self._sound = False
        receive(self, self.engine.settled())
        self._sound = True

    def passed(self, seconds: float, *, complete: bool) -> None:
        """A forward pass took so long: tell the manager where its time went, unless it failed before its end."""
        if complete and self.fused is not None:
            self.fused.flush()
        time = self.clock.passed(self.engine, self.host, self.phase, seconds, len(self._layers))
        if complete:
            self.manager.passed(time)
