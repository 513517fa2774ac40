"""What a quota is, how layers with a cache each divide a capacity, and how to find one by name. Never imports torch.

Whoever asks knows bytes and tiers; a quota knows slots, layers and what was routed. The same events give the same
division, live and replayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from cache.errors import PolicyError
from cache.registry import Part, Registry
from cache.types import RoutingEvent

if TYPE_CHECKING:
    from cache.traces.trace import Trace


class Quota(Part, ABC):
    """How many experts each layer's cache has room for.

    One of one's own needs `divide`, and `observe` if it goes by what a running model uses. It hands out the whole
    capacity, and no layer more than its experts: `slots` sees to that.
    """

    can_learn: ClassVar[bool] = False
    """Whether it makes use of a profile if there is one; set where `learn` is overridden."""

    every_pass: ClassVar[bool] = False
    """Whether it is asked anew before every forward pass, and not only before every prompt."""

    adapts: bool = False
    """Whether it changes with what is observed, and is asked anew; set where `observe` is overridden. A rule that a
    profile has told all takes it back in `learn`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.can_learn = cls.learn is not Quota.learn
        if "adapts" not in cls.__dict__:
            cls.adapts = cls.observe is not Quota.observe

    def __init__(self, num_layers: int, num_experts: int, params: Any = None) -> None:
        super().__init__(num_layers, num_experts, params)
        self.reset()

    def learn(self, profile: Trace) -> None:
        """Take from a recorded trace what can be known beforehand. Called at most once, before the first event."""

    def reset(self) -> None:
        """Forget what was observed; what was learnt from a profile stays.

        Subclasses call this, then create their own state.
        """

    def observe(self, event: RoutingEvent) -> None:
        """Take note of what one layer uses. Events come in the order in which the layers run."""

    @abstractmethod
    def divide(self, total: int) -> list[int]:
        """`total` slots, of which there are fewer than experts: one number a layer. No side effect."""

    def slots(self, total: int) -> list[int]:
        """`divide`, as far as there are experts for so many slots, or PolicyError for what is no division of them: a
        user's own quota may return anything."""
        if total >= self.num_layers * self.num_experts:
            return [self.num_experts] * self.num_layers
        slots = [int(n) for n in self.divide(total)]
        if len(slots) != self.num_layers or sum(slots) != total or min(slots) < 0 or max(slots) > self.num_experts:
            raise PolicyError(
                f'quota "{self.name}" divided {total} places among {self.num_layers} layers of {self.num_experts} '
                f"experts as {slots}: fix it, so that all are given and no layer has more than its experts"
            )
        return slots


_registry: Registry[Quota] = Registry("quota", Quota, ["cache.quotas"])  # type: ignore[type-abstract]
register = _registry.register
names = _registry.names
find_quota = _registry.find


def make_quota(spec: str, num_layers: int, num_experts: int, profile: Trace | None = None) -> Quota:
    """The quota that `spec` names, such as "even", "plec(rate=0.01)" or "my_module:MyQuota".

    Raises PolicyError as `Registry.make` does; TraceError for the profile of another model, where it would be used.
    """
    quota = _registry.make(spec, num_layers, num_experts)
    if profile is not None and quota.can_learn:
        profile.check_model(num_layers, num_experts)
        quota.learn(profile)
        quota.reset()
    return quota


def even(total: int, num_layers: int, num_experts: int) -> list[int]:
    """The same for every layer; the first layers take what is left over."""
    each, rest = divmod(min(total, num_layers * num_experts), num_layers)
    return [each + (layer < rest) for layer in range(num_layers)]


def proportional(total: int, weights: Sequence[float], most: int) -> list[int]:
    """`total` divided in proportion to positive `weights`, none above `most`; fractions go to the largest first."""
    total = min(total, len(weights) * most)
    exact = np.zeros(len(weights))
    free = np.ones(len(weights), np.bool_)
    while free.any():
        # What goes beyond the most goes to the others.
        share = np.array(weights) * (total - exact[~free].sum()) / np.array(weights)[free].sum()
        full = free & (share > most)
        exact[free] = share[free]
        if not full.any():
            break
        exact[full] = most
        free &= ~full
    slots = np.floor(exact + 1e-9).astype(np.int64)
    largest = np.argsort(-(exact - slots), kind="stable")
    slots[largest[: total - int(slots.sum())]] += 1
    return [int(n) for n in slots]
