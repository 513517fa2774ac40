"""One token's way through an MoE block, router and experts, without the modules between, for models that need not be
exact.

Blocks are known by their code. Where one of their modules has hooks, all are called as before.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offload.formats.cpu.routing import TokenRouter
from offload.layers.routing import token_router
from offload.layers.source import forward_code

ExpertsOfToken = Callable[[nn.Module, torch.Tensor, TokenRouter, torch.Tensor, bool], torch.Tensor]
"""What computes an experts module's share of one token: x [1, H], with the router that has chosen for it, and what the
sum of their outputs is added to [..., H]; and whether it may go on when this returns (`offload.formats.cpu.begun`)."""

_JITTER = """
if self.training and self.jitter_noise > 0:
    hidden_states *= torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
_, top_k_weights, top_k_index = self.gate(hidden_states)
hidden_states = self.experts(hidden_states, top_k_index, top_k_weights)
hidden_states = hidden_states.reshape(batch_size, sequence_length, hidden_dim)
return hidden_states
"""
_RESHAPED = """
hidden_states_reshaped = hidden_states.view(-1, hidden_dim)
_, routing_weights, selected_experts = self.gate(hidden_states_reshaped)
final_hidden_states = self.experts(hidden_states_reshaped, selected_experts, routing_weights)
return final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)
"""
_AT_ONCE = """
hidden_states = hidden_states.view(-1, hidden_dim)
_, top_k_weights, top_k_index = self.gate(hidden_states)
final_hidden_states = self.experts(hidden_states, top_k_index, top_k_weights).reshape(
    batch_size, sequence_length, hidden_dim)
return final_hidden_states
"""
_WITH_SCORES = """
hidden_states = hidden_states.reshape(-1, hidden_dim)
_, router_scores, router_indices = self.router(hidden_states)
hidden_states = self.experts(hidden_states, router_indices, router_scores)
hidden_states = hidden_states.reshape(batch_size, sequence_length, hidden_dim)
return (hidden_states, router_scores)
"""
_SHAPE = "batch_size, sequence_length, hidden_dim = hidden_states.shape"
_FORWARD = {ast.unparse(ast.parse(_SHAPE + rest)) for rest in (_JITTER, _RESHAPED, _AT_ONCE, _WITH_SCORES)}
"""What the blocks' `forward` does."""


class MoeBlock:
    """A block, its router and its experts. `compute` is what computes these, as long as anything does."""

    compute: ExpertsOfToken | None = None

    def __init__(self, block: nn.Module, gate: str) -> None:
        self._block, self._gate = block, gate

    @classmethod
    def of(cls, block: nn.Module) -> MoeBlock | None:
        """None for a block whose code is not known."""
        cls_of_block: Any = type(block)
        if not hasattr(block, "experts") or forward_code(cls_of_block) not in _FORWARD:
            return None
        return cls(block, "gate" if hasattr(block, "gate") else "router")

    def router(self, k: int) -> TokenRouter | None:
        """For a token x [k], what chooses its experts, if `experts` may be called instead of the block then."""
        modules = self._block._modules
        router, experts = modules[self._gate], modules["experts"]
        if router is None or experts is None or self.compute is None or self._block.training:
            return None
        for each in (self._block, router, experts):
            if each._forward_hooks or each._forward_pre_hooks:
                return None
        return token_router(router, k)

    def experts(self, x: torch.Tensor, router: TokenRouter, before: torch.Tensor, *, goes_on: bool) -> torch.Tensor:
        """x [1, H] for which the router has chosen, and `before` [..., H] -> that and what the block gives.

        `goes_on`: whoever gets it waits for it.
        """
        experts = self._block._modules["experts"]
        assert experts is not None and self.compute is not None
        return self.compute(experts, x, router, before, goes_on)


def compute_experts_by(model: nn.Module, compute: ExpertsOfToken | None) -> None:
    """Let `compute` compute the experts of tokens that go through blocks of `model` so; None: nothing goes so."""
    for module in model.modules():
        block = getattr(module, "moe_block", None)
        if isinstance(block, MoeBlock):
            block.compute = compute
