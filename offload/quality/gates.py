"""How gates' inputs change from layer to layer, and how many experts a look through the next gates finds with that.

A look through the next gates takes the present gate's input for theirs. Adding the average difference, DALI's residual
vectors (arXiv:2602.03495), brings it nearer. Whether that finds more of the experts depends on the model, so it is
measured as well, on prompts of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cache.errors import TraceError
from offload.checkpoint.layout import ExpertMap
from offload.layers.lookahead import GateLookahead
from offload.layers.router import router_beside


class MeanInputs:
    """While attached, averages over all tokens what every gate is given."""

    def __init__(self, model: nn.Module, experts: ExpertMap) -> None:
        self._sums: dict[int, torch.Tensor] = {}
        self.tokens = 0
        self._hooks = [
            router.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            for index, router in _routers(model, experts)
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def offsets(self) -> NDArray[np.float32]:
        """[L - 1, H]: from each gate's mean to the next one's. The mean of differences, since all see every token."""
        means = torch.stack([self._sums[layer] for layer in sorted(self._sums)]) / max(self.tokens, 1)
        offsets: NDArray[np.float32] = means.diff(dim=0).float().numpy()
        return offsets

    def _hook(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else next(iter(kwargs.values()))
            rows = hidden.detach().reshape(-1, hidden.shape[-1])
            total = rows.sum(0, dtype=torch.float64).cpu()
            self._sums[layer] = self._sums[layer] + total if layer in self._sums else total
            self.tokens += len(rows) if layer == 0 else 0

        return hook


class Recall:
    """While attached, counts how many of the experts that routers choose the gates before them had named.

    Raises TraceError as `GateLookahead` does.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: ExpertMap,
        depth: int,
        offsets: NDArray[np.float32] | None = None,
    ) -> None:
        self._depth = depth
        self._found, self._asked = np.zeros((depth, 2), np.int64), np.zeros((depth, 1), np.int64)
        self._said: dict[int, NDArray[Any]] = {}
        self._gates = GateLookahead(model, experts, depth, self._said.__setitem__, offsets=offsets)
        self._hooks = [router.register_forward_hook(self._hook(index)) for index, router in _routers(model, experts)]

    def detach(self) -> None:
        """Take the hooks off."""
        self._gates.detach()
        for hook in self._hooks:
            hook.remove()

    @property
    def share(self) -> NDArray[np.float64]:
        """[D, 2]: by distance, of the chosen experts, those among the first K named and among all P."""
        return self._found / np.maximum(self._asked, 1)

    def _hook(self, layer: int) -> Any:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            chosen = output[2].reshape(-1, output[2].shape[-1]).cpu().numpy()
            top_k = chosen.shape[1]
            for distance in range(1, min(self._depth, layer) + 1):
                said = self._said[layer - distance][:, distance - 1]
                named = (said[:, :, None] == chosen[:, None]).any(-1)
                self._found[distance - 1] += named[:, :top_k].sum(), named.sum()
                self._asked[distance - 1] += chosen.size

        return hook


def _routers(model: nn.Module, experts: ExpertMap) -> Iterator[tuple[int, nn.Module]]:
    for layer in experts.layers:
        _, router = router_beside(model, layer)
        if router is None:
            raise TraceError(f"{layer.path} has no router beside it: there is nothing to calibrate")
        yield layer.index, router


class Watcher(Protocol):
    """What watches a model until it is detached."""

    def detach(self) -> None: ...


@contextmanager
def attached(*watchers: Watcher) -> Iterator[None]:
    """Detaches them in the end."""
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.detach()
