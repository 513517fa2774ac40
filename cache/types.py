"""The words every other module speaks: which expert, which tier, which routing event."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ExpertKey(NamedTuple):
    """The only identity of a routed expert: its MoE layer (counting only those, from 0) and its index."""

    layer: int
    expert: int


class Tier(str, Enum):
    """Where an expert's bytes can be. Disk always holds all of them; the others are caches."""

    __hash__ = str.__hash__  # that of Enum is Python code

    DISK = "disk"
    CPU = "cpu"
    GPU = "gpu"


class Phase(str, Enum):
    """Whether a forward pass reads a prompt (several tokens a sequence) or continues it (one)."""

    PREFILL = "prefill"
    DECODE = "decode"


class Opening(NamedTuple):
    """What a forward pass reads, known before its first layer."""

    ids: tuple[int, ...]
    """Its tokens, sequence after sequence, padding included."""
    embedding: NDArray[np.float32] | None = None
    """[D]: a sketch of their embeddings, averaged; see docs/traces.md."""


class RoutingEvent(NamedTuple):
    """One MoE layer of one forward pass: the SET of experts it needs now.

    `experts` lists each needed expert once, by ascending total router weight (ties by id), which is the order
    in which policies see them touched; `weights` are those totals and `tokens` the number of tokens routed to
    each. `ahead` is what a look through the gates of the next 1, 2, ... layers said, where somebody looked:
    experts, the likeliest first. `scores`, float32 [experts], are the router's logits averaged over the event's
    tokens, where they are known. With the first layer's event comes the pass's `opening`, where somebody looked.
    """

    sequence: int
    step: int
    layer: int
    phase: Phase
    experts: tuple[int, ...]
    weights: tuple[float, ...]
    tokens: tuple[int, ...]
    ahead: tuple[tuple[int, ...], ...] = ()
    opening: Opening | None = None
    scores: NDArray[np.float32] | None = None

    @property
    def keys(self) -> list[ExpertKey]:
        """The needed experts as identities, in touch order."""
        return list(map(_KEYS[self.layer].__getitem__, self.experts))


def before_first(sequence: int, step: int, phase: Phase, opening: Opening) -> RoutingEvent:
    """The beginning of a forward pass as an event: no layer's, since its layer is -1, and one that needs nothing."""
    return RoutingEvent(sequence, step, -1, phase, (), (), (), opening=opening)


class _LayerKeys(dict[int, ExpertKey]):
    """One object for each expert of a layer: finding it takes far less time than making it, and equals are the same."""

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def __missing__(self, expert: int) -> ExpertKey:
        key = self[expert] = ExpertKey(self._layer, expert)
        return key


class _Keys(dict[int, _LayerKeys]):
    """The same for each layer."""

    def __missing__(self, layer: int) -> _LayerKeys:
        keys = self[layer] = _LayerKeys(layer)
        return keys


_KEYS = _Keys()
