"""Any expert, with equal chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.policy import EvictionPolicy, register


@dataclass(frozen=True)
class RandomParams:
    """`seed` tells one random order from another."""

    seed: int = 0


@register
class Random(EvictionPolicy):
    """Evict a random expert. The order is drawn anew in every forward pass, from the seed alone.

    It is a hash of seed, layer, expert and pass (mixed as in SplitMix64: Steele, Lea and Flood, OOPSLA 2014), so that
    no random state is shared and the order does not depend on how pools are laid out. Source: folklore.
    """

    name = "random"
    Params = RandomParams

    def reset(self) -> None:
        super().reset()
        columns = range(self.num_layers * self.num_experts)
        seeds = np.array([_mixed(_mixed(self.params.seed) + column) for column in columns], np.uint64)
        self._seeds = self.lanes.spread(seeds)

    def priorities(self, lanes: slice) -> NDArray[np.uint64]:
        drawn: NDArray[np.uint64] = (self._seeds[lanes] ^ np.uint64(_mixed(self.step))) * _ODD
        return drawn


_ODD = np.uint64(0xD1342543DE82EF95)


def _mixed(bits: int) -> int:
    """64 bits that look random."""
    bits = (bits + 1) * 0x9E3779B97F4A7C15 % 2**64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)
