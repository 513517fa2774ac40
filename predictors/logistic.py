"""Ours: a logistic regression on the routing so far, fitted while running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from predictors.base import register
from predictors.ranking import check_size
from predictors.regression import Regression


@dataclass(frozen=True)
class LogisticParams:
    """`context`: how many of the latest layers it goes by, besides the target's own experts a pass before. `reach`: how
    many layers ahead it looks. `rate`: how much a single event changes."""

    context: int = 3
    reach: int = 3
    rate: float = 1.6

    def __post_init__(self) -> None:
        if min(self.context, self.reach) < 1 or not 0 < self.rate < 8:
            raise ValueError(f"context {self.context} and reach {self.reach}: at least 1; rate {self.rate}: 0 to 8")


@register
class Logistic(Regression):
    """Fits what `transition` counts: how much each expert of the latest layers speaks for or against each later one.

    Counted pairs say the same thing several times over, since the experts of a layer go together; weights fitted
    jointly do not. A profile gives the weights to start with; without one they start at nothing and are of use after
    some hundred tokens. They take 4 (context + 1) reach L E^2 bytes: 38 MB for 48 layers of 128 experts.

    Source: this project.
    """

    name = "logistic"
    Params = LogisticParams

    def __init__(self, num_layers: int, num_experts: int, params: Any = None) -> None:
        chosen = LogisticParams() if params is None else params
        self.context, self.rate = min(chosen.context, num_layers), chosen.rate
        self.reach = min(chosen.reach, num_layers)
        size = 4 * (self.context + 1) * self.reach * num_layers * num_experts**2
        check_size(self.name, size, f"lower context, now {chosen.context}, or reach, now {chosen.reach}")
        super().__init__(num_layers, num_experts, chosen)
