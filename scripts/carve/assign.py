"""Which neuron belongs to which expert, and the first routers: from the dense teacher's activations."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import functional as F

from scripts.carve.student import Shape

CALIBRATION_TOKENS = 12_000
SWEEPS = 8


@torch.no_grad()
def mlp_inputs(teacher: Any, documents: list[torch.Tensor]) -> list[torch.Tensor]:
    """The input of every layer's MLP, [CALIBRATION_TOKENS, H] bfloat16 each, over the first documents."""
    seen: list[list[torch.Tensor]] = [[] for _ in teacher.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][0]))
        for layer, kept in zip(teacher.model.layers, seen, strict=True)
    ]
    tokens = 0
    for document in documents:
        teacher.model(document[None])
        tokens += len(document)
        if tokens >= CALIBRATION_TOKENS:
            break
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept)[:CALIBRATION_TOKENS] for kept in seen]


def _balanced_clusters(points: torch.Tensor, groups: int) -> torch.Tensor:
    """Group of each point [N], all of one size: k-means whose surest points choose first. Deterministic."""
    size = len(points) // groups
    centres = points[torch.linspace(0, len(points) - 1, groups).long()]
    member = torch.zeros(len(points), dtype=torch.long)
    for _ in range(SWEEPS):
        likeness = points @ centres.T
        two = likeness.topk(2, dim=1).values
        wishes = likeness.argsort(dim=1, descending=True).tolist()
        room = [size] * groups
        for point in (two[:, 0] - two[:, 1]).argsort(descending=True).tolist():
            group = next(g for g in wishes[point] if room[g])
            room[group] -= 1
            member[point] = group
        centres = F.normalize(torch.stack([points[member == g].mean(0) for g in range(groups)]), dim=1)
    return member


@torch.no_grad()
def carve_layer(mlp: Any, inputs: torch.Tensor, shape: Shape, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [I], router [E, H]) of one MLP.

    The neurons that contribute most on most tokens are shared. The others are clustered by the tokens on which
    they matter, after a random projection (Johnson-Lindenstrauss) of that profile. The router is ridge regression
    of each expert's output energy on the MLP's input, scaled so that scores spread by about one within a token.
    """
    x = inputs.float()
    hidden = F.silu(F.linear(inputs, mlp.gate_proj.weight)) * F.linear(inputs, mlp.up_proj.weight)
    weight = hidden.float().abs() * mlp.down_proj.weight.float().norm(dim=0)  # [T, I] contribution
    matters = weight >= weight.topk(weight.shape[1] // 8, dim=1).values[:, -1:]
    order = matters.float().mean(0).argsort(descending=True)
    shared, rest = order[: shape.shared], order[shape.shared :]
    noise = torch.randn(len(x), 128, generator=torch.Generator().manual_seed(seed))
    profile = F.normalize(matters[:, rest].T.to(torch.bfloat16) @ noise.to(torch.bfloat16), dim=1).float()
    member = _balanced_clusters(profile, shape.experts)
    groups = [rest[member == e].sort().values for e in range(shape.experts)]
    energy = torch.stack([(F.linear(hidden[:, g], mlp.down_proj.weight[:, g])).float().norm(dim=1) for g in groups], 1)
    energy = energy / energy.mean(dim=1, keepdim=True)
    gram = x.T @ x
    ridge = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    router = torch.linalg.solve(ridge, x.T @ energy).T
    router = router / (x @ router.T).std(dim=1).mean()
    return torch.cat([shared.sort().values, *groups]), router


@torch.no_grad()
def refit_down(carved: Any, mlp: Any, inputs: torch.Tensor) -> None:
    """Start the down-projection's low-rank term where it repairs most of what the lost experts leave out.

    Reduced-rank regression (Izenman 1975): the least-squares correction of W on the carved layer's hidden
    values, projected on the strongest directions of what it predicts. Changes `carved.down_proj` in place.
    """
    kept: list[torch.Tensor] = []
    hook = carved.down_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    left = mlp(inputs).float() - carved(inputs).float()  # [T, H]
    hook.remove()
    hidden = kept[0].float()  # [T, I]
    gram = hidden.T @ hidden
    ridge = gram + 0.02 * gram.diagonal().mean() * torch.eye(len(gram))
    fix = torch.linalg.solve(ridge, hidden.T @ left)  # [I, H]
    rank = carved.down_proj.a.shape[0]
    _, vectors = torch.linalg.eigh(fix.T @ gram @ fix)
    top = vectors[:, -rank:]
    a = (fix @ top).T  # [r, I]
    spread = a.norm(dim=1, keepdim=True).clamp_min(1e-8)
    carved.down_proj.a.copy_(a / spread)
    carved.down_proj.b.copy_(top * spread.T)


def carve(teacher: Any, documents: list[torch.Tensor], shape: Shape, seed: int) -> tuple[list[torch.Tensor], Any]:
    """(inputs of each MLP, [(order, router)] of each layer)."""
    began = time.time()
    inputs = mlp_inputs(teacher, documents)
    carves = []
    for index, (layer, x) in enumerate(zip(teacher.model.layers, inputs, strict=True)):
        carves.append(carve_layer(layer.mlp, x, shape, seed + index))
        if index % 10 == 9:
            print(f"carved {index + 1} layers, {time.time() - began:.0f} s", flush=True)
    return inputs, carves


@torch.no_grad()
def refit_gates(student: Any, documents: list[torch.Tensor], shape: Shape) -> None:
    """Go over to `shape`, which differs in its `router_scale`, and start where it does least harm.

    A neuron was made to count as its gate made it count. Each expert's outputs are scaled by E[g] / E[g^2], g being how
    much more or less its new gate gives it on its tokens: what remains is how much that varies. Changes `student`.
    """
    layers = student.model.layers
    sums = torch.zeros(len(layers), 2, shape.experts)

    def see(mlp: Any, args: tuple[torch.Tensor], total: torch.Tensor) -> None:
        best = F.linear(args[0].float(), mlp.router).flatten(0, -2).topk(shape.top_k, dim=-1)
        old, new = (torch.softmax(scale * best.values, -1) for scale in (mlp.shape.router_scale, shape.router_scale))
        for power, row in enumerate(total, 1):
            row.index_add_(0, best.indices.flatten(), (new / old).pow(power).flatten())

    hooks = [
        layer.mlp.register_forward_pre_hook(lambda mlp, args, total=total: see(mlp, args, total))
        for layer, total in zip(layers, sums, strict=True)
    ]
    for document in documents:
        student.model(document[None])
    for hook in hooks:
        hook.remove()
    factors = torch.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1].clamp_min(1e-12), 1.0)
    for layer, factor in zip(layers, factors, strict=True):
        up = layer.mlp.up_proj.scale
        size = (len(up) - shape.shared) // shape.experts
        up[shape.shared :] = (1 + up[shape.shared :]) * factor.repeat_interleave(size) - 1
        layer.mlp.shape = shape
