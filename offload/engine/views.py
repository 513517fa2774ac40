"""Experts' parameters as views of the slots that their bytes are in."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.layers.gated import placed
from offload.layers.products import EXACT, Products
from offload.store.base import ExpertStore, Weights


class Views:
    """Makes them, and keeps them: a tensor view costs microseconds. One set is for all layers that look alike."""

    def __init__(self, store: ExpertStore, experts: ExpertMap, products: Products) -> None:
        self._store = store
        self._products = products
        layouts: dict[Hashable, int] = {}
        self._layout = [layouts.setdefault(store.layout(layer.index), len(layouts)) for layer in experts.layers]
        self._kept: dict[tuple[int, int, int], Weights] = {}

    def weights(self, layer: ExpertLayer, precision: int, slots: Sequence[torch.Tensor]) -> Weights:
        """The expert whose slices are in `slots` (uint8) as the layer's parameters."""
        if len(slots) > 1:  # too many pairs of slots to keep
            return self._store.weights(layer.index, precision, slots)
        key = self._layout[layer.index], precision, slots[0].data_ptr()
        if key not in self._kept:
            weights = self._store.weights(layer.index, precision, slots)
            if self._products != EXACT and slots[0].device.type == "cpu":
                weights = self._products.of_expert(weights, transposed=layer.is_transposed)
            if slots[0].device.type == "cpu":
                weights = placed(weights)
            self._kept[key] = weights
        return self._kept[key]

    def clear(self) -> None:
        """Forget every view, so that the slots' memory can be given back."""
        self._kept.clear()
