"""What the experts of one layer give for the rows of a pass, and how: products one after the other, or a kernel that
computes whole experts.

As in transformers' `grouped_mm` every (token, k) result is kept, weighted, and reduced with one sum over k. In which
order the experts are computed does not matter to the result, so each is computed when its weights are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offload.engine.protocols import Group
from offload.formats import GatedRows
from offload.formats.cpu.combine import combine, serves
from offload.layers.autocast import uncast
from offload.layers.gated import GatedExpert, gated_rows, placed
from offload.layers.rows import row_products
from offload.store.base import Weights

_WHOLE_VECTORS = 128


def compute_expert(module: Any, hidden: torch.Tensor, weights: Weights) -> torch.Tensor:
    """One expert's products: hidden [M, H] -> [M, H], as `module` (an experts module) does; see `finish_expert`."""
    weights = placed(weights)
    rows = gated_rows(module, hidden, weights)
    if rows is None or len(hidden) > rows.most_rows:
        return _products(module, hidden, weights)
    y, count = torch.empty_like(hidden, memory_format=torch.contiguous_format), len(hidden)
    rows.compute([_place(weights)], torch.arange(count), [(0, count)], y)
    return y


def finish_expert(module: Any, y: torch.Tensor) -> torch.Tensor:
    """What some families do to an expert's output [M, H] with weights that lie where the dense ones do."""
    return module.post_expert_norm(y) if module.has_post_expert_norm else y


class Outputs:
    """Of T tokens, of which each goes to K experts: row t * K + k of `y` [T * K, H] is what token t's k-th one gives.

    Expert e has the rows `order[slice(*spans[e])]`; those that nobody computes are `dropped`, and count as zero.
    """

    def __init__(
        self,
        module: Any,
        hidden: torch.Tensor,
        top_k: int,
        order: torch.Tensor,
        spans: Mapping[int, tuple[int, int]],
        dropped: torch.Tensor | None = None,
    ) -> None:
        self.y: torch.Tensor | None = None
        self.missing = set(spans)
        self._module, self._hidden, self._top_k = module, hidden, top_k
        self._order, self._spans, self._dropped = order, spans, dropped
        self._gated: dict[int, GatedRows] = {}  # by what computes

    def places(self, expert: int) -> torch.Tensor:
        """The rows of `y` that are the expert's [M]."""
        start, end = self._spans[expert]
        return self._order[start:end]

    def rows(self, expert: int) -> torch.Tensor:
        """The rows of `hidden` that go to the expert [M]."""
        return self.places(expert) // self._top_k

    def compute(self, group: Group) -> None:
        """What experts at one precision give for all their rows."""
        gated = self._gated_rows(group[0][1])
        most = 0 if gated is None else gated.most_rows
        whole = [each for each in group if self._rows_of(each[0]) <= most]
        others = [each for each in group if self._rows_of(each[0]) > most] if len(whole) < len(group) else []
        if gated is not None and whole:
            self._compute_whole(gated, whole)
        if others:
            self._compute_by_products(others)

    def _compute_whole(self, gated: GatedRows, group: Group) -> None:
        y = self._room(self._hidden)
        gated.compute([_place(own) for _, own in group], self._order, [self._spans[expert] for expert, _ in group], y)
        if self._module.has_post_expert_norm:
            for expert, _ in group:
                places = self.places(expert)
                y[places] = finish_expert(self._module, y[places])
        self.missing.difference_update(expert for expert, _ in group)

    def _compute_by_products(self, group: Group) -> None:
        if len(self._hidden) == 1 and all(self._rows_of(expert) == 1 for expert, _ in group):
            y = _products_each(self._module, self._hidden, [own for _, own in group])
            self._put([expert for expert, _ in group], y)
            return
        for expert, own in group:
            self._put([expert], _products(self._module, self._hidden[self.rows(expert)], own))

    def _rows_of(self, expert: int) -> int:
        start, end = self._spans[expert]
        return end - start

    def put(self, expert: int, y: torch.Tensor) -> None:
        """What was computed elsewhere: y [M, H] of an expert's rows."""
        self._put([expert], y)

    def sum(self, top_k_weights: torch.Tensor) -> torch.Tensor:
        """top_k_weights [T, K] -> [T, H]; experts that nobody computed count as zero."""
        if self.y is None:
            return torch.zeros_like(self._hidden)
        for expert in self.missing:  # a fallback that may, left it out
            self.y[self.places(expert)] = 0
        if self._dropped is not None:
            self.y[self._dropped] = 0
        if self._hidden.dtype is torch.bfloat16 and serves(self.y, top_k_weights):
            return combine(self.y, top_k_weights)
        weights = top_k_weights.reshape(-1, 1)
        y = self.y.mul_(weights) if weights.dtype == self.y.dtype else self.y * weights
        return y.view(*top_k_weights.shape, -1).sum(dim=1).to(self._hidden.dtype)

    def _put(self, experts: Sequence[int], y: torch.Tensor) -> None:
        """`y`: a row of each of `experts`, or all rows of one."""
        y = finish_expert(self._module, y)
        places = [self.places(expert) for expert in experts]
        room = self._room(y)
        room.index_copy_(0, places[0] if len(places) == 1 else torch.cat(places), y.to(room.dtype))
        self.missing.difference_update(experts)

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        if self.y is None:
            self.y = like.new_empty(len(self._hidden) * self._top_k, like.shape[1])
        return self.y

    def _gated_rows(self, weights: Weights) -> GatedRows | None:
        """All rows for a kernel that computes whole experts stored as `weights` are."""
        if not isinstance(weights, GatedExpert):
            return None
        by = id(weights.form)
        if by not in self._gated:
            rows = gated_rows(self._module, self._hidden, weights)
            if rows is None:
                return None
            self._gated[by] = rows
        return self._gated[by]


def _place(weights: Weights) -> tuple[int, ...]:
    assert isinstance(weights, GatedExpert)
    return weights.place


def _products(module: Any, hidden: torch.Tensor, weights: Weights) -> torch.Tensor:
    """The operations and their order are those of transformers' grouped_mm path, so that no bit differs."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    y = _linear(module, hidden, weights, up)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    return _linear(module, y, weights, "down_proj")


def _products_each(module: Any, hidden: torch.Tensor, group: Sequence[Weights]) -> torch.Tensor:
    """A row of each of several experts at one precision: hidden [1, H] -> [len(group), H].

    The bits are those of `_products` for each; what differs is that a step of all is one call, or few.
    """
    up = "gate_up_proj" if module.has_gate else "up_proj"
    y = _linear_each(module, hidden, group, up)
    gate = module._apply_gate if module.has_gate else module.act_fn
    # What a row has beyond whole vectors of the processor is computed otherwise, and must be at its end here, too.
    y = _joined([gate(row) for row in y.split(1)]) if y.shape[1] % _WHOLE_VECTORS else gate(y)
    return _linear_each(module, y, group, "down_proj")


def _linear(module: Any, x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    weight = weights[name]
    with uncast(x):
        if isinstance(weight, torch.Tensor):
            y = torch.mm(x.to(weight.dtype), weight if module.is_transposed else weight.t())
        else:
            y = weight.linear(x)
    if module.has_bias:
        bias = weights[f"{name}_bias"]
        assert isinstance(bias, torch.Tensor)
        y.add_(bias)
    return y


def _linear_each(module: Any, x: torch.Tensor, group: Sequence[Weights], name: str) -> torch.Tensor:
    """x [1, K] or [len(group), K] -> [len(group), N]."""
    matrices: list[Any] = [weights[name] for weights in group]
    first = matrices[0]
    with uncast(x):
        if isinstance(first, torch.Tensor):
            y = row_products(x.to(first.dtype), matrices, module.is_transposed)
        else:
            y = first.linear_each(x, matrices)
    if module.has_bias:
        for weights, out in zip(group, y, strict=True):
            out.add_(weights[f"{name}_bias"])
    return y


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of one dtype, one below the other."""
    with uncast(rows[0]):
        return torch.cat(rows)
