"""The layers at the start of a pass, whose token no gate has seen yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from predictors.base import register
from predictors.regression import Regression


@dataclass(frozen=True)
class FirstLayersParams:
    """`layers`: how many layers of the next pass are predicted; `context`, `reach` and `rate` as for `logistic`."""

    layers: int = 2
    context: int = 4
    reach: int = 3
    rate: float = 1.6

    def __post_init__(self) -> None:
        if min(self.layers, self.context, self.reach) < 1 or not 0 < self.rate < 8:
            counts = f"layers {self.layers}, context {self.context} and reach {self.reach}"
            raise ValueError(f"{counts}: at least 1; rate {self.rate}: 0 to 8")


@register
class FirstLayers(Regression):
    """The first layers of the next pass, from the experts of the last ones and those they used themselves.

    Looking through gates says nothing about them: the next token is not there yet, and by the time it is, its first
    layers are due. So they are guessed by ids alone. AdapMoE trains a gate for this, on the last hidden state of the
    token before, which an event does not carry; here it is a logistic regression on that token's experts. Nothing is
    said of layers in the same pass.

    Source: the purpose from Zhong et al., AdapMoE, arXiv 2408.10284; the method is this project's.
    """

    name = "first-layers"
    Params = FirstLayersParams

    def __init__(self, num_layers: int, num_experts: int, params: Any = None) -> None:
        chosen = FirstLayersParams() if params is None else params
        self.context, self.rate = min(chosen.context, num_layers), chosen.rate
        self.reach = min(chosen.reach, num_layers)
        super().__init__(num_layers, num_experts, chosen)

    def wanted(self, layer: int, lead: int) -> bool:
        return self.num_layers <= layer + lead < self.num_layers + int(self.params.layers)
