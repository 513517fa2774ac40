"""What a predictor of the next experts is, and how to find one by name. Never imports torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from cache.registry import Part, Registry
from cache.types import ExpertKey, RoutingEvent


@dataclass(frozen=True, slots=True)
class Prediction:
    """One expert that will be needed, the predictor says.

    `probability` lies in [0, 1]; `lead_layers` >= 1 is how many MoE layers after the last observed one it is
    needed, counted on into the next forward pass.
    """

    key: ExpertKey
    probability: float
    lead_layers: int


class Predictor(Part, ABC):
    """Watches the routing and says which experts the next layers will need; others decide to fetch."""

    def reset(self) -> None:
        """Forget the sequences seen so far; what was trained beforehand stays."""

    @abstractmethod
    def observe(self, event: RoutingEvent) -> None:
        """Take note of one layer's routing. Events come in the order in which the layers run."""

    @abstractmethod
    def predict(self) -> list[Prediction]:
        """The experts needed after the last observed event, each once, most urgent first. No side effect."""


_registry: Registry[Predictor] = Registry("predictor", Predictor, ["predictors.none"])  # type: ignore[type-abstract]
register = _registry.register
names = _registry.names
find_predictor = _registry.find
make_predictor = _registry.make
