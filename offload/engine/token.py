"""One token's experts in one call, weighted, added up, and added to what came before them.

That is where all are resident, and a kernel computes them whole. The call begins before their event is decided on and
noted down, which changes nothing for them. Otherwise they are computed as any rows are.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import torch

from offload.engine.hook import offload_experts_forward
from offload.engine.outputs import Outputs
from offload.engine.protocols import HANDLE, Group
from offload.formats import GatedRows
from offload.formats.cpu import begun
from offload.formats.cpu.routing import TokenRouter
from offload.layers.gated import GatedExpert, gated_rows


def token_experts(
    module: Any, x: torch.Tensor, router: TokenRouter, before: torch.Tensor, goes_on: bool = False
) -> torch.Tensor:
    """x [1, H] -> `before` [..., H] and what the experts of `module` give that `router` has chosen.

    With `goes_on` that is there after `begun.wait()`, while a pass is under way. Raises TransferError when an expert
    cannot be read. Side effects: the caches change as the manager decides.
    """
    runtime, layer = getattr(module, HANDLE)
    experts, weights = router.experts.tolist(), router.weights.tolist()
    parts = runtime.recorder, runtime.observer, runtime.fused, runtime.host, runtime.by_token and runtime.by_token.keep
    if any(part is not None for part in parts):
        y = offload_experts_forward(module, x, torch.tensor([experts]), _weights(router))
        return before + y.view_as(before)
    runtime.clock.count_begun()  # the layer before's: this one's router has waited for it
    at_hand, begun_s = runtime.at_hand(layer, experts), time.perf_counter()
    result = _begin(module, x, at_hand, router, before) if at_hand else None
    outputs = None
    try:
        with closing(runtime.run(layer, experts, weights, [1] * len(experts), together=len(experts))) as available:
            for group in available:
                if not at_hand:
                    begun_s = time.perf_counter()
                    result = _begin(module, x, group, router, before) if len(group) == len(experts) else None
                if result is None:
                    outputs = outputs or _outputs(module, x, experts)
                    outputs.compute(group)
        if result is not None:
            runtime.clock.begun(time.perf_counter() - begun_s)
    finally:
        if not (goes_on and runtime.in_pass):
            begun.wait()
    if result is not None:
        return result
    return before + (outputs or _outputs(module, x, experts)).sum(_weights(router)).view_as(before)


def _begin(
    module: Any, x: torch.Tensor, group: Group, router: TokenRouter, before: torch.Tensor
) -> torch.Tensor | None:
    """Begin what all of the router's experts give, which are this group, where a kernel computes them whole."""
    rows = _whole(module, x, group)
    if rows is None:
        return None
    own: dict[int, Any] = dict(group)
    inner = group[0][1].place[-1]  # type: ignore[attr-defined]
    return rows.token([own[expert].packed for expert in router.experts], inner, router, before)


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
