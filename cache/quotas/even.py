"""The same for all."""

from __future__ import annotations

from cache.quota import Quota, even, register


@register
class Even(Quota):
    """Every layer has the same; the first layers take what is left over. Source: folklore."""

    name = "even"

    def divide(self, total: int) -> list[int]:
        return even(total, self.num_layers, self.num_experts)
