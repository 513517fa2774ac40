"""The student: the dense teacher with every MLP carved into experts, and small corrections to train."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """What is carved: `shared` neurons always on, the rest split over `experts`, of which `top_k` answer."""

    experts: int = 16
    top_k: int = 8
    shared: int = 512
    router_scale: float = 2.0**-12
    mlp_rank: int = 24
    attention_rank: int = 8


class Corrected(nn.Module):
    """A frozen bfloat16 linear W [out, in] with fp32 corrections: y = (1 + scale) * (W + B A) x."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.weight: torch.Tensor
        self.register_buffer("weight", weight.detach().to(torch.bfloat16))
        self.a = nn.Parameter(torch.randn(rank, in_features) / math.sqrt(in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        self.scale = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return (F.linear(x, self.weight) + low) * (1 + self.scale).to(x.dtype)


class Norm(nn.Module):
    """RMSNorm with an fp32 master weight."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class CarvedMLP(nn.Module):
    """The MLP with its neurons reordered, shared ones first, then expert by expert.

    All neurons are computed and those of the experts that lost the top-k are multiplied by zero. `order` [I] is
    the dense neuron at each place, `router` [E, H] gives scores of about unit spread; the checkpoint stores
    `router_scale * router`. The gradient of the hard choice is that of a sigmoid around the threshold
    (straight-through; Bengio et al. 2013), so training can also move who is chosen.
    """

    def __init__(self, mlp: Any, order: torch.Tensor, router: torch.Tensor, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("order", order)
        self.router = nn.Parameter(router.clone())
        self.gate_proj = Corrected(mlp.gate_proj.weight[order], shape.mlp_rank)
        self.up_proj = Corrected(mlp.up_proj.weight[order], shape.mlp_rank)
        self.down_proj = Corrected(mlp.down_proj.weight[:, order], shape.mlp_rank)
        self.last_choice: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        scores = F.linear(x.float(), self.router)  # [..., E]
        best = scores.topk(shape.top_k + 1, dim=-1)
        on = torch.zeros_like(scores).scatter_(-1, best.indices[..., : shape.top_k], 1.0)
        self.last_choice = on.detach()
        threshold = best.values[..., -2:].mean(-1, keepdim=True).detach()
        soft = torch.sigmoid(scores - threshold)
        gates = on * torch.exp(shape.router_scale * (scores - best.values[..., :1]))
        gates = gates * (shape.top_k / gates.sum(-1, keepdim=True))  # 1 for every chosen expert when flat
        gates = (gates + soft - soft.detach()).to(x.dtype)
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)  # [..., I]
        shared, routed = hidden[..., : shape.shared], hidden[..., shape.shared :]
        routed = routed.unflatten(-1, (shape.experts, -1)) * gates.unsqueeze(-1)
        y: torch.Tensor = self.down_proj(torch.cat([shared, routed.flatten(-2)], -1))
        return y


def build(teacher: Any, carves: list[tuple[torch.Tensor, torch.Tensor]], shape: Shape) -> Any:
    """A student that shares the teacher's embedding; `carves` holds (order [I], router [E, H]) of each layer."""
    student = copy.deepcopy(teacher).requires_grad_(False)
    student.model.embed_tokens.weight = teacher.model.embed_tokens.weight
    student.lm_head.weight = teacher.lm_head.weight
    eps = teacher.config.rms_norm_eps
    for layer, (order, router) in zip(student.model.layers, carves, strict=True):
        layer.mlp = CarvedMLP(layer.mlp, order, router, shape)
        for name in ATTENTION:
            weight = getattr(layer.self_attn, name).weight
            setattr(layer.self_attn, name, Corrected(weight, shape.attention_rank))
        layer.input_layernorm = Norm(layer.input_layernorm.weight, eps)
        layer.post_attention_layernorm = Norm(layer.post_attention_layernorm.weight, eps)
    student.model.norm = Norm(student.model.norm.weight, eps)
    return student
