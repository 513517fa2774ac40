"""One token's experts in one call, weighted, added up, and added to what came before them.

That is where all are resident, and a kernel computes them whole. Otherwise they are computed as any rows are.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch

from offload.engine.hook import offload_experts_forward
from offload.engine.outputs import Outputs
from offload.engine.protocols import HANDLE, Group
from offload.formats import GatedRows
from offload.formats.cpu.routing import TokenRouter
from offload.layers.gated import GatedExpert, gated_rows


def token_experts(module: Any, x: torch.Tensor, router: TokenRouter, before: torch.Tensor) -> torch.Tensor:
    """x [1, H] -> `before` [..., H] and what the experts of `module` give that `router` has chosen.

    Raises TransferError when an expert cannot be read. Side effects: the caches change as the manager decides.
    """
    runtime, layer = getattr(module, HANDLE)
    experts, weights = router.experts.tolist(), router.weights.tolist()
    if any(part is not None for part in (runtime.recorder, runtime.observer, runtime.fused, runtime.host)):
        y = offload_experts_forward(module, x, torch.tensor([experts]), _weights(router))
        return before + y.view_as(before)
    count, result, outputs = len(experts), None, None
    with closing(runtime.run(layer, experts, weights, [1] * count, together=count)) as available:
        for group in available:
            rows = _whole(module, x, group) if len(group) == count else None
            if rows is not None:
                places: dict[int, Any] = dict(group)
                result = rows.token([places[expert].place for expert in experts], router, before)
            else:
                outputs = outputs or _outputs(module, x, experts)
                outputs.compute(group)
    if result is not None:
        return result
    return before + (outputs or _outputs(module, x, experts)).sum(_weights(router)).view_as(before)


def _whole(module: Any, x: torch.Tensor, group: Group) -> GatedRows | None:
    """The row for a kernel that computes experts of one precision whole, and all else."""
    weights = group[0][1]
    if not isinstance(weights, GatedExpert) or module.has_post_expert_norm:
        return None
    rows = gated_rows(module, x, weights)
    return None if rows is None or not rows.most_rows else rows


def _outputs(module: Any, x: torch.Tensor, experts: list[int]) -> Outputs:
    spans = {expert: (k, k + 1) for k, expert in enumerate(experts)}
    return Outputs(module, x, len(experts), torch.arange(len(experts)), spans)


def _weights(router: TokenRouter) -> torch.Tensor:
    """[1, K]"""
    return torch.tensor([router.weights.tolist()], dtype=torch.bfloat16 if router.rounds else torch.float32)
