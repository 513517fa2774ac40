"""One call of a layer whose experts are found by slot: all at once, or some now and some later."""

from __future__ import annotations

from typing import Protocol

import torch

from offload.engine.fused.places import ExpertPlaces


class Kernels(Protocol):
    """`offload.engine.fused.kernels`, or what computes the same in tests. Neither function waits for the device."""

    def gate_up(
        self, x: torch.Tensor, slots: torch.Tensor, inner: torch.Tensor, block: torch.Tensor, places: ExpertPlaces
    ) -> None:
        """x [T, H] and slots int32 [T, K] -> `inner` [T*K, I], where a slot is not negative; `block`: the slots."""

    def down(
        self,
        inner: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
        partial: torch.Tensor,
        out: torch.Tensor,
        block: torch.Tensor,
        places: ExpertPlaces,
        complete: bool,
    ) -> None:
        """inner [T*K, I], slots [T, K], weights [T, K]: the pairs with slots into `partial`; or, if it is `complete`,
        these and what is there already, weighted and summed over k, into `out` [T, H]."""


class FusedLayer:
    """hidden [T, H] and router weights [T, K] on their way to `out` [T, H].

    Which pairs (token, k) are computed in which call makes no difference to a bit of it.
    """

    def __init__(self, kernels: Kernels, places: ExpertPlaces, hidden: torch.Tensor, weights: torch.Tensor) -> None:
        self._kernels, self._places = kernels, places
        self._hidden, self._weights = hidden.contiguous(), weights.contiguous()
        self._inner = hidden.new_empty(weights.numel(), places.down.k)
        self._partial: torch.Tensor | None = None
        self.out = torch.empty_like(self._hidden)

    def all(self, slots: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Everything: two launches. `slots` int32 [T, K] in `block` (uint8). Gives `out`."""
        nothing = self._hidden.new_empty(1, dtype=torch.float32)
        self._compute(slots, block, nothing, complete=True)
        return self.out

    def some(self, slots: torch.Tensor, block: torch.Tensor, *, last: bool) -> None:
        """The pairs whose slot is not negative: two launches. After the `last` ones `out` is there."""
        self._compute(slots, block, self._outputs(), complete=last)

    def put(self, pairs: list[int], outputs: torch.Tensor) -> None:
        """What was computed elsewhere: these pairs' `outputs` [M, H], not weighted."""
        for pair, output in zip(pairs, outputs, strict=True):
            self._outputs()[pair] = output

    def _compute(self, slots: torch.Tensor, block: torch.Tensor, partial: torch.Tensor, *, complete: bool) -> None:
        self._kernels.gate_up(self._hidden, slots, self._inner, block, self._places)
        self._kernels.down(self._inner, slots, self._weights, partial, self.out, block, self._places, complete)

    def _outputs(self) -> torch.Tensor:
        if self._partial is None:
            self._partial = self._hidden.new_zeros(len(self._inner), self._hidden.shape[1], dtype=torch.float32)
        return self._partial
