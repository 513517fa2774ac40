"""One token's router in one call, for models that need not be exact: its product, the softmax and the choice.

Routers are known by their code. Weights may differ from torch's in the last bit, and of experts with equal scores the
first is chosen.
"""

from __future__ import annotations

import ast
import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from offload.checkpoint.layout import ExpertMap
from offload.formats.cpu import native
from offload.formats.cpu.combine import MOST
from offload.formats.cpu.plain import serves
from offload.formats.cpu.routing import TokenRouter, route
from offload.layers.autocast import autocasts
from offload.layers.instead import original, with_ours
from offload.layers.router import router_beside
from offload.layers.source import forward_code


class Kind(NamedTuple):
    """How a router makes weights of scores; see `offload.formats.cpu.routing.route`.

    `scaled` may be the name of what of the router says so. Scores and weights have the router's dtype, or float32.
    """

    of_chosen: bool
    scaled: bool | str
    wide_scores: bool
    wide_weights: bool
    biased: bool = False


_ALL = """
hidden_states = hidden_states.reshape(-1, self.hidden_dim)
router_logits = F.linear(hidden_states, self.weight)
router_probs = torch.nn.functional.softmax({softmax})
router_top_value, router_indices = torch.topk(router_probs, self.top_k, dim=-1)
{scale}
{weights}
return (router_logits, router_scores, router_indices)
"""
_SCALE = "router_top_value /= router_top_value.sum(dim=-1, keepdim=True)"
_ROUNDED = "router_top_value = router_top_value.to(router_logits.dtype)\nrouter_scores = router_top_value"
_AS_IT_IS = "router_scores = router_top_value"
_CHOSEN = """
router_logits = F.linear(hidden_states, self.weight).float()
top_k_logits, top_k_index = router_logits.topk(self.top_k, dim=-1)
top_k_weights = torch.softmax(top_k_logits, dim=-1).type_as(hidden_states)
return (router_logits, top_k_weights, top_k_index)
"""
_BIASED = """
router_logits = F.linear(hidden_states, self.weight, self.bias)
router_top_value, router_indices = torch.topk(router_logits, self.top_k, dim=-1)
router_scores = torch.nn.functional.softmax(router_top_value, dim=1, dtype=router_top_value.dtype)
return (router_logits, router_scores, router_indices)
"""
_FLOAT = "router_logits, dtype=torch.float, dim=-1"
_KINDS = {
    ast.unparse(ast.parse(code)): kind
    for code, kind in {
        _ALL.format(softmax=_FLOAT, scale=f"if self.norm_topk_prob:\n    {_SCALE}", weights=_ROUNDED): Kind(
            False, "norm_topk_prob", False, False
        ),
        _ALL.format(softmax=_FLOAT, scale=_SCALE, weights=_ROUNDED): Kind(False, True, False, False),
        _ALL.format(softmax="router_logits.float(), dim=-1", scale=_SCALE, weights=_AS_IT_IS): Kind(
            False, True, False, True
        ),
        _CHOSEN: Kind(True, False, True, False),
        _BIASED: Kind(True, False, False, False, biased=True),
    }.items()
}
"""What routers' `forward` does, by its code."""


class _Router(nn.Module):
    """Goes before a model's own class."""

    kind: Kind
    taken: tuple[Any, torch.Tensor] | None = None
    """The weight that the kernel takes, and the same as a plain tensor: `RouterWeight` looks at every use of it."""
    made: tuple[tuple[Any, ...], TokenRouter] | None = None
    """What `token_router` gave last, and what it was made of."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden_states [..., H] -> scores [T, E], weights [T, K] and experts [T, K]."""
        own: Any = self
        x, kind = hidden_states, self.kind
        bias = own.bias if kind.biased else None
        weight = self._weight()
        if weight is None or x.numel() != weight.shape[1] or not _takes(x, bias, len(weight)):
            found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = super().forward(hidden_states)
            return found
        dtype = torch.float32 if kind.wide_weights else x.dtype
        scores, weights, chosen = route(
            x, weight, own.top_k, of_chosen=kind.of_chosen, scaled=self._scaled(), dtype=dtype, bias=bias
        )
        return scores.float() if kind.wide_scores else scores, weights, chosen

    def token_router(self, k: int) -> TokenRouter | None:
        """See below. None, too, where the kernel does not take what the router has now."""
        own: Any = self
        kind = self.kind
        bias = own.bias if kind.biased else None
        weight, top_k, scaled = self._weight(), own.top_k, self._scaled()
        if weight is None or weight.shape[1] != k or top_k > MOST:
            return None
        if bias is not None and not _takes(bias, bias, len(weight)):
            return None
        # It holds on to the memory, so that other parameters have other addresses.
        of = weight.data_ptr(), weight.shape, None if bias is None else bias.data_ptr(), top_k, scaled
        if self.made is None or self.made[0] != of:
            says = {"of_chosen": kind.of_chosen, "scaled": scaled, "rounds": not kind.wide_weights}
            self.made = of, TokenRouter(weight, top_k, **says, bias=bias)
        return self.made[1]

    def _scaled(self) -> bool:
        scaled = self.kind.scaled
        return bool(getattr(self, scaled) if isinstance(scaled, str) else scaled)

    def _weight(self) -> torch.Tensor | None:
        """The router's matrix, if the kernel takes it."""
        own: Any = self
        weight = own.weight
        if self.taken is None or self.taken[0] is not weight or self.taken[1].data_ptr() != weight.data_ptr():
            plain = weight.data.as_subclass(torch.Tensor)
            there = plain.dtype is torch.bfloat16 and plain.is_cpu and plain.is_contiguous()
            self.taken = (weight, plain) if there and serves(plain.dtype, plain.shape[1]) else None
        return None if self.taken is None else self.taken[1]


def use_routing(model: nn.Module, experts: ExpertMap) -> None:
    """Let the routers of `model` that lie in host memory, and whose code is known, choose so."""
    if not native.level():
        return
    for layer in experts.layers:
        _, router = router_beside(model, layer)
        cls: Any = type(router)
        kind = kind_of(original(cls))
        if kind is not None and not isinstance(router, _Router):
            own: Any = router
            own.__class__ = with_ours(_Router, cls)
            own.kind = kind


def token_router(router: nn.Module, k: int) -> TokenRouter | None:
    """For a kernel that goes on to a router with x [k] of one token; None where none does to this one."""
    return router.token_router(k) if isinstance(router, _Router) else None


@functools.cache
def kind_of(cls: Any) -> Kind | None:
    """How routers of this class make weights; None for one that does something else."""
    return _KINDS.get(forward_code(cls) or "")


def _takes(x: torch.Tensor, bias: torch.Tensor | None, experts: int) -> bool:
    tensors = (x,) if bias is None else (x, bias)
    there = all(each.dtype is torch.bfloat16 and each.is_cpu and each.is_contiguous() for each in tensors)
    return there and (bias is None or len(bias) == experts) and not autocasts(x)
