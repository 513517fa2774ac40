"""Events of layers that were computed before anyone on the host knew what they routed, told to the manager later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from cache.types import Phase
from offload.checkpoint.layout import ExpertLayer
from offload.device.base import Device
from offload.engine.runtime import ExpertRuntime


@dataclass
class Routing:
    """Which pairs (token, k) go to which expert, and with which total weight."""

    pairs: dict[int, list[int]] = field(default_factory=dict)
    totals: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, experts: torch.Tensor, weights: torch.Tensor) -> Routing:
        """From experts [T, K] and weights [T, K], wherever they are: waits for them. Sums run in the pairs' order."""
        routing = cls()
        values: list[float] = weights.reshape(-1).tolist()
        for pair, expert in enumerate(experts.reshape(-1).tolist()):
            routing.pairs.setdefault(expert, []).append(pair)
            routing.totals[expert] = routing.totals.get(expert, 0.0) + values[pair]
        return routing

    @property
    def event(self) -> tuple[list[int], list[float], list[int]]:
        """Experts, their total weights, and their numbers of tokens: what `ExpertRuntime.run` takes."""
        return list(self.pairs), list(self.totals.values()), [len(pairs) for pairs in self.pairs.values()]


@dataclass(frozen=True)
class _Event:
    sequence: int
    step: int
    phase: Phase
    layer: ExpertLayer
    experts: Callable[[], torch.Tensor]
    weights: Callable[[], torch.Tensor]


class DeferredEvents:
    """Keeps events until `tell`. Everything they use must be resident, and stay so until then.

    Their routing is copied to host memory meanwhile. The manager hears of all events in the order of the layers, so it
    decides what it would have decided at once.
    """

    def __init__(self, runtime: ExpertRuntime, device: Device) -> None:
        self._runtime, self._device = runtime, device
        self._events: list[_Event] = []

    def add(self, layer: ExpertLayer, experts: torch.Tensor, weights: torch.Tensor) -> None:
        """`layer` has routed to experts [T, K] with weights [T, K] on the device; waits for nothing."""
        runtime, later = self._runtime, self._device.read_later
        self._events.append(
            _Event(runtime.sequence, runtime.step, runtime.phase, layer, later(experts), later(weights))
        )

    def tell(self) -> None:
        """Let the manager have the events; waits until the device has got so far. Raises what a policy raises."""
        runtime = self._runtime
        events, self._events = self._events, []
        now = runtime.sequence, runtime.step, runtime.phase
        try:
            for event in events:
                runtime.sequence, runtime.step, runtime.phase = event.sequence, event.step, event.phase
                for _ in runtime.run(event.layer, *Routing.of(event.experts(), event.weights()).event):
                    pass  # it has been computed
        finally:
            runtime.sequence, runtime.step, runtime.phase = now

    def drop(self) -> None:
        """Let nobody have them."""
        self._events.clear()
