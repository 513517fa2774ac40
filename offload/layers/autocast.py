"""Under `torch.autocast`, transformers' grouped experts are multiplied as their weights are: it casts no such product.

Ours are made of products that it would cast, and of tensors put together, which it refuses for some dtypes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_AS_IT_IS: AbstractContextManager[object] = nullcontext()


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on where `x` lies; never for one without data, of whose device torch knows no autocast."""
    # First what costs next to nothing: this is asked beside every product of a token.
    return torch._C._is_any_autocast_enabled() and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def cast(x: torch.Tensor) -> torch.Tensor:
    """`x` as autocast gives it to a linear layer."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x) and x.dtype != torch.float64 else x


def uncast(x: torch.Tensor) -> AbstractContextManager[object]:
    """A block in which autocast leaves products with `x` alone."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else _AS_IT_IS
