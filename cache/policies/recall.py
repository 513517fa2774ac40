"""Ours: keep what was used soonest after past moments that resemble the present one. Learns nothing beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Ints, Lanes, Touch
from cache.policy import EvictionPolicy, register

Array = NDArray[np.float32]


@dataclass(frozen=True)
class RecallParams:
    """`window`: how many forward passes are remembered. `own` and `focus`: how much the layer's own experts count
    beside those of the layers before, and how sharply attention falls on the passes most alike; what has less than
    e^-`cutoff` of the highest weight is left out. `fade`: what is left of a layer's overlap one layer on. `discount`:
    what a use is worth for each pass that it is further away, up to `horizon`. `rate` and `prior`: a decayed
    frequency's rate of
    forgetting, and its weight. `bypass`: a fetched expert is kept only if it outranks what would have to go."""

    window: int = 512
    focus: float = 0.22
    own: float = 3.0
    fade: float = 0.93
    discount: float = 0.75
    horizon: int = 16
    cutoff: float = 4.0
    rate: float = 0.15
    prior: float = 0.5
    bypass: bool = False

    def __post_init__(self) -> None:
        if self.window < 2 or self.horizon < 1:
            raise ValueError(f"a window of {self.window} and a horizon of {self.horizon} passes: at least 2 and 1")


@register
class Recall(EvictionPolicy):
    """Evict the expert whose next use is expected to be farthest, by attention over the routing history.

    Every past pass is compared with the present one: how many experts do they share, in this layer and in those that
    ran before it? A softmax over these overlaps says how much each past pass counts, and an expert's value is the
    expectation of discount^(passes until it was used - 1), plus a decayed frequency for what the history does not
    know. In a pool of several layers a layer that comes sooner counts for more, by the same discount.

    Source: this project. Rules that rank an expert by its own history alone all close about 30 % of the gap between LRU
    and Belady on gpt-oss-20b, this one more than half (docs/policies.md). One event costs 25 to 35 microseconds.
    """

    name = "recall"
    Params = RecallParams

    def reset(self) -> None:
        super().reset()
        self.bypass = self.params.bypass
        lanes = self.lanes
        self._lanes_each = lanes.num_layers // lanes.layers
        self._histories: dict[int, History] = {}
        self._values = self.zeros()
        self._layer = 0
        self._nearness = self.params.discount ** passes_to_go(lanes)

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        lanes, top = self.lanes, touch.experts.shape[1]
        self._layer = touch.columns.start // lanes.experts
        latest = -1
        # Layer by layer even where a replay touches all at once: each speaks of those that ran before it.
        for row, lane in enumerate(range(*touch.lanes.indices(lanes.count))):
            copy, layer = divmod(lane, self._lanes_each)
            layer += self._layer
            history = self._histories.get(copy)
            if history is None:
                history = self._histories[copy] = History(lanes.num_layers, lanes.experts, self.params)
            if touch.new_pass and copy != latest:
                history.begin_pass()
            latest = copy
            members = touch.experts[row] if touch.sizes is None else touch.experts[row, top - touch.sizes[row] :]
            self._values[lane, touch.columns] = history.use(layer, members)

    def values(self, lanes: slice) -> NDArray[np.float64]:
        """What every expert was worth after its layer's last event, [lanes in the slice, width]."""
        return self._values[lanes]

    def priorities(self, lanes: slice) -> NDArray[np.float64]:
        worth: NDArray[np.float64] = self._values[lanes] * self._nearness[self._layer]
        return worth


def passes_to_go(lanes: Lanes) -> NDArray[np.float64]:
    """From an event of each layer of a lane to the next one of each column's: the part of a pass, [layers, width]."""
    layers = np.arange(lanes.layers)
    ahead = (layers - layers[:, None] - 1) % lanes.num_layers + 1
    return (ahead / lanes.num_layers).repeat(lanes.experts, axis=1)


class History:
    """The last `window` passes of one model, as a ring; and how much each of them resembles the present one."""

    def __init__(self, num_layers: int, num_experts: int, params: RecallParams) -> None:
        self._params = params
        window = params.window
        self._used = np.zeros((num_layers, num_experts, window), np.float32)
        self._soon = np.zeros((num_layers, window, num_experts), np.float32)
        """discount^(passes until the next use - 1) of each expert, after each pass; 0 while there was none."""
        self._frequency = np.zeros((num_layers, num_experts), np.float32)
        self._overlap = np.zeros(window, np.float32)
        self._past = np.full(window, -np.inf, np.float32)
        """0 for a past pass; minus infinity for an empty place, and for the present one."""
        self._passes = 0
        self._slot = 0
        ahead = np.arange(min(params.horizon, window - 1))
        self._ahead = ahead
        self._discount = (params.discount**ahead).astype(np.float32)[:, None]

    def begin_pass(self) -> None:
        """A forward pass begins: the pass before it is past, and what was like it is followed by one pass more."""
        window = self._params.window
        if self._passes:
            self._past[self._slot] = 0
        self._slot = self._passes % window
        self._passes += 1
        self._past[self._slot] = -np.inf
        self._overlap = np.roll(self._overlap, 1)
        self._used[:, :, self._slot] = 0
        self._soon[:, self._slot] = 0
        self._recent = ((self._slot - 1 - self._ahead) % window)[:, None]

    def use(self, layer: int, members: Ints) -> Array:
        """The layer's event uses `members`, each once; what every expert of the layer is worth after it, [experts]."""
        params, used, soon = self._params, self._used[layer], self._soon[layer]
        # Of the passes so far, those without a use of a member until now have found their next one.
        soon[self._recent, members] = np.maximum(soon[self._recent, members], self._discount)
        shared = used[members].sum(axis=0)
        used[members, self._slot] = 1
        self._overlap *= params.fade
        self._overlap += shared
        frequency = self._frequency[layer]
        frequency *= 1 - params.rate
        frequency[members] += params.rate
        value: Array = params.prior * frequency
        if self._passes > 1:
            shared *= params.own
            shared += self._overlap
            shared *= params.focus
            shared += self._past
            shared -= shared.max()
            alike = (shared > -params.cutoff).nonzero()[0]
            attention = np.exp(shared[alike])
            value += (attention / attention.sum()) @ soon[alike]
        return value
