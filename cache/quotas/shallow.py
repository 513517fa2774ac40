"""Whole first layers."""

from __future__ import annotations

from cache.quota import Quota, even, register


@register
class Shallow(Quota):
    """The first layers, an eighth of all, are whole, and the rest is even. Fewer are whole where the rest would keep
    less than half of its even share.

    Source: Fang et al., Fate, arXiv 2502.12224, which finds how many layers are badly predicted: 3 or 4 of 24.
    """

    name = "shallow"

    def divide(self, total: int) -> list[int]:
        layers, experts = self.num_layers, self.num_experts
        least = total // layers // 2
        whole = -(-layers // 8)
        while whole and whole * experts + (layers - whole) * least > total:
            whole -= 1
        rest = layers - whole
        return [experts] * whole + (even(total - whole * experts, rest, experts) if rest else [])
