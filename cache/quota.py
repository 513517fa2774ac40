"""How the layers' caches divide a capacity."""

from __future__ import annotations

from cache.errors import PolicyError
from cache.trace import Trace


def even(total: int, num_layers: int) -> list[int]:
    """The same for every layer; the first layers take what is left over."""
    each, rest = divmod(total, num_layers)
    return [each + (layer < rest) for layer in range(num_layers)]


def split(name: str, total: int, num_layers: int, num_experts: int, profile: Trace | None) -> list[int]:
    """`total` slots divided by the rule called `name`: one number a layer."""
    if name != "even":
        raise PolicyError(f'--quota "{name}": choose even')
    return even(total, num_layers)
