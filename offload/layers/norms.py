"""RMSNorm in one call, for models that need not be exact: squares are added up in another order than torch's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from offload.formats.cpu.norm import rms_norm, serves
from offload.layers.autocast import autocasts
from offload.layers.instead import original, with_ours
from offload.layers.source import forward_code

_BEGINNING = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
"""
_TWICE = {
    _BEGINNING.strip() + "\nreturn self.weight * hidden_states.to(input_dtype)": True,
    _BEGINNING.strip() + "\nreturn (self.weight * hidden_states).to(input_dtype)": False,
}
"""What transformers' classes do, and whether that rounds twice."""


class _RMSNorm(nn.Module):
    """Goes before a model's own class."""

    twice: bool

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., n] -> the same shape."""
        own: Any = self
        if not serves(hidden_states, own.weight) or autocasts(hidden_states):
            result: torch.Tensor = super().forward(hidden_states)
            return result
        return rms_norm(hidden_states, own.weight, own.variance_epsilon, twice=self.twice)


def use_norms(model: nn.Module) -> None:
    """Let the norms of `model` whose code is known be computed by our kernel, their parameters and hooks kept."""
    for module in model.modules():
        cls: Any = type(module)
        known = "RMSNorm" in cls.__name__ and not issubclass(cls, _RMSNorm)
        twice = rounds_twice(cls) if known else None
        if twice is not None:
            own: Any = module
            own.__class__ = with_ours(_RMSNorm, cls)
            own.twice = twice


@functools.cache
def rounds_twice(cls: Any) -> bool | None:
    """Whether a norm of this class rounds before its weight, too; None for a class that does something else."""
    return _TWICE.get(forward_code(original(cls)) or "")
