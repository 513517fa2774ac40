"""How a model's matrices are multiplied on the CPU: plain ones by our kernels or torch's, inputs rounded or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from offload.checkpoint.layout import ExpertLayer
from offload.formats.cpu import columns
from offload.formats.cpu.plain import is_faster, most_rows, products, serves
from offload.layers.autocast import autocasts
from offload.layers.rows import use_rows
from offload.store.base import Matrix, Weights
from offload.store.record import StoredMatrix


@dataclass(frozen=True)
class Products:
    """What the user chose. `exact`: plain products have the bits of torch's own. `int8_inputs`: what products with
    matrices of a format take in is rounded to 8 bits, where the format has kernels for that."""

    exact: bool = True
    int8_inputs: bool = False

    def of_expert(self, weights: Weights, *, transposed: bool) -> Weights:
        """An expert's parameters in host memory, with matrices that are multiplied so.

        Plain ones are [n, k], or [k, n] if `transposed`.
        """
        return {name: self._matrix(value, transposed) for name, value in weights.items()}

    def _matrix(self, value: torch.Tensor | Matrix, transposed: bool) -> torch.Tensor | Matrix:
        if isinstance(value, StoredMatrix) and self.int8_inputs:
            return replace(value, form=value.form.with_int8_inputs())
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not self.exact:
            return PlainMatrix(value, transposed) if _serves(transposed, value.dtype, value.shape[1]) else value
        return value


def is_exact(asked: bool | None) -> bool:
    """Whether the CPU computes with torch's bits: as the user `asked`, or else where torch's products are fast."""
    return not is_faster() if asked is None else asked


EXACT = Products()
"""Every matrix is multiplied as it was found."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainMatrix:
    """A matrix [n, k] in host memory, kept as [k, n] if `transposed`."""

    weight: torch.Tensor
    transposed: bool

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [m, k] -> x @ W.T [m, n], in the dtype of the matrix."""
        if len(x) > most_rows():
            return torch.mm(x.to(self.weight.dtype), self.weight if self.transposed else self.weight.t())
        return self.linear_each(x, [self])

    def linear_each(self, x: torch.Tensor, matrices: Sequence[PlainMatrix]) -> torch.Tensor:
        """A row for each of `matrices`: x [1, k] or [len(matrices), k] -> [len(matrices), n]."""
        multiply = columns.products if self.transposed else products
        return multiply(x.to(self.weight.dtype), [matrix.weight for matrix in matrices])


class PlainLinear(nn.Linear):
    """A linear layer whose product is our kernel's, where it lies on the CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] -> [..., n]."""
        too_many = x.numel() > most_rows() * self.in_features
        if too_many or x.device.type != "cpu" or x.dtype != self.weight.dtype or autocasts(x):
            return super().forward(x)
        y = products(x.reshape(-1, self.in_features), [self.weight])
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)


def use_products(model: nn.Module, *, exact: bool) -> None:
    """Let the plain linear layers of `model` be computed the fastest way, their parameters and hooks kept.

    `exact`: with the bits of torch's own products.
    """
    if not exact:
        for module in model.modules():
            if type(module) is nn.Linear and _serves(False, module.weight.dtype, module.in_features):
                module.__class__ = PlainLinear
    use_rows(model)


def takes_our_products(layer: ExpertLayer, dtype: torch.dtype | None) -> bool:
    """Whether our kernel multiplies all matrices of the layer's experts, at `dtype` or as the model has them."""
    matrices = [parameter for parameter in layer.parameters if len(parameter.shape) == 2]
    return all(_serves(layer.is_transposed, dtype or matrix.dtype, matrix.shape[1]) for matrix in matrices)


def _serves(transposed: bool, dtype: torch.dtype, k: int) -> bool:
    """Whether a row's product with matrices of a dtype and with so many columns is our kernel's."""
    return is_faster() and columns.serves(dtype, k) if transposed else most_rows() > 0 and serves(dtype, k)
