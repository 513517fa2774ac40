"""How the layers' caches divide a capacity: one number of slots a layer, none above the number of experts.

All rules hand out the whole capacity, as far as there are experts to fill it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache.errors import PolicyError, TraceError
from cache.traces.miss_ratio import lru_miss_ratio_curve
from cache.traces.profiles import activation_matrices
from cache.traces.trace import Trace

NAMES = ("even", "shallow", "dp", "distinct")
_SEQUENCES = 1000  # of a profile, to count distinct experts in


def split(name: str, total: int, num_layers: int, num_experts: int, profile: Trace | None) -> list[int]:
    """`total` slots divided by the rule called `name`: one number a layer.

    Raises PolicyError for an unknown rule, and for one that measures and gets no profile; TraceError for the profile of
    another model.
    """
    if name not in NAMES:
        raise PolicyError(f'--quota "{name}": choose one of {", ".join(NAMES)}')
    if name == "even":
        return even(total, num_layers, num_experts)
    if name == "shallow":
        return shallow(total, num_layers, num_experts)
    if profile is None:
        raise PolicyError(f"--quota {name} measures a recorded trace: name one with --profile")
    shape = profile.num_layers, profile.num_experts
    if shape != (num_layers, num_experts):
        raise TraceError(
            f"{profile.name} has {shape[0]} layers of {shape[1]} experts, not {num_layers} of {num_experts}: "
            "name a profile of the same model"
        )
    if name == "dp":
        return most_hits(total, lru_miss_ratio_curve(profile, cold=True).hits)
    return distinct(total, profile)


def even(total: int, num_layers: int, num_experts: int) -> list[int]:
    """The same for every layer; the first layers take what is left over."""
    each, rest = divmod(min(total, num_layers * num_experts), num_layers)
    return [each + (layer < rest) for layer in range(num_layers)]


def shallow(total: int, num_layers: int, num_experts: int) -> list[int]:
    """The first layers, an eighth of all, whole; the rest even. Fewer, where the rest would keep less than half of its
    even share.

    Source: Fang et al., Fate, arXiv 2502.12224, which finds how many layers are badly predicted: 3 or 4 of 24.
    """
    total = min(total, num_layers * num_experts)
    least = total // num_layers // 2
    whole = -(-num_layers // 8)
    while whole and whole * num_experts + (num_layers - whole) * least > total:
        whole -= 1
    rest = num_layers - whole
    return [num_experts] * whole + (even(total - whole * num_experts, rest, num_experts) if rest else [])


def most_hits(total: int, hits: NDArray[np.int64]) -> list[int]:
    """The division with the most hits, where `hits` [L, E + 1] are those of a layer's cache of 0 to E experts.

    Dynamic programming over layers: the most hits with j slots in the first i layers, over all that the last of them
    can get. Source: Zhong et al., AdapMoE, arXiv 2408.10284, whose costs are a formula of prefetch accuracy; these
    are measured. O(L total E).
    """
    num_layers, num_experts = hits.shape[0], hits.shape[1] - 1
    total = min(total, num_layers * num_experts)
    best = np.full(total + 1, -1, np.int64)  # -1: cannot be
    best[0] = 0
    taken = np.zeros((num_layers, total + 1), np.int64)
    for layer in range(num_layers):
        padded = np.concatenate([np.full(num_experts, -1), best])
        # [k, j]: hits with k slots here, and j - k in the layers before.
        before = np.stack([padded[num_experts - k : len(padded) - k] for k in range(num_experts + 1)])
        reached = np.where(before < 0, -1, before + hits[layer][:, None])
        taken[layer] = reached.argmax(axis=0)
        best = reached.max(axis=0)
    slots = []
    for layer in reversed(range(num_layers)):
        slots.append(int(taken[layer, total]))
        total -= slots[-1]
    return slots[::-1]


def distinct(total: int, profile: Trace) -> list[int]:
    """In proportion to the number of distinct experts that a sequence of the profile uses in a layer, on average.

    Source: He et al., ExpertFlow, arXiv 2410.17954, which predicts that number for every batch.
    """
    used = (activation_matrices(profile, _SEQUENCES) > 0).sum(axis=2).mean(axis=0)
    return proportional(total, used.tolist(), profile.num_experts)


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
