"""Routers that prefer what is resident: where the fallback `cache-prior` acts.

Every router is tried out while a model is loaded, and any but the plain kind is refused. In transformers 5.23 that kind
is served in 24 families: Mixtral, OLMoE and FlexOlmo, Qwen2 to Qwen4 with what sees and hears, gpt-oss, Granite's four,
Jamba, MiniMax, Mistral 4, Cohere 2, Aria, Mellum, and the small DeepSeek OCR models. Those with a correction bias,
groups, sigmoids or scaled weights, such as DeepSeek-V3 and GLM, are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cache.errors import PolicyError
from offload.checkpoint.layout import ExpertMap
from offload.decide.fallbacks.cache_prior import CachePrior
from offload.decide.manager import Manager
from offload.layers.router import family_of, router_beside

_PROBES = 32  # inputs that a router is tried with
_TOLERANCE = 0.02  # relative; weights are rounded to the model's dtype


def reroute(logits: torch.Tensor, chosen: torch.Tensor, resident: torch.Tensor, by: float, keep: int) -> torch.Tensor:
    """Which experts to take instead of `chosen` [T, K]: the best K once the `logits` [T, E] of those `resident` [E]
    (bool) are raised, the `keep` best of the unchanged ones in any case. In the order of the unchanged logits."""
    top_k = chosen.shape[-1]
    raised = logits + by * resident
    raised.scatter_(-1, logits.topk(min(keep, top_k), dim=-1).indices, float("inf"))
    taken = raised.topk(top_k, dim=-1).indices
    taken = taken.gather(-1, logits.gather(-1, taken).argsort(dim=-1, descending=True, stable=True))
    same = (taken.sort(-1).values == chosen.sort(-1).values).all(-1, keepdim=True)
    return torch.where(same, chosen, taken)


class RouterPrior:
    """While attached, the routers of `model` choose as `fallback` says, by what is resident where experts compute.

    Raises PolicyError, naming the family, unless every router is tried and found to be the plain kind: it takes the
    experts of the highest logits, which it returns, at the weights that a softmax of them gives, over all experts or
    over those it takes.
    """

    def __init__(self, model: nn.Module, experts: ExpertMap, fallback: CachePrior, manager: Manager) -> None:
        self._fallback = fallback
        self._manager = manager
        self._family = family_of(model)
        routers = []
        for layer in experts.layers:
            _, router = router_beside(model, layer)
            routers.append((router, layer.index, layer.num_experts, self._sums_to_one(router, layer.num_experts)))
        self._hooks = [
            router.register_forward_hook(self._hook(layer, num_experts, sums_to_one))
            for router, layer, num_experts, sums_to_one in routers
            if router is not None
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, layer: int, num_experts: int, sums_to_one: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: object, output: Any) -> Any:
            logits, weights, chosen = output[:3]
            scores = logits.float()
            resident = torch.zeros(num_experts, dtype=torch.bool)
            resident[self._manager.stacks.resident(layer)] = True
            ranges = (scores.amax(-1) - scores.amin(-1)).tolist()
            by = self._fallback.raise_by(layer, ranges)
            taken = reroute(scores, chosen, resident.to(scores.device), by, self._fallback.params.keep)
            if torch.equal(taken, chosen):
                return None
            changed = (taken != chosen).any(-1, keepdim=True)
            self._manager.serving.rerouted(len(set(taken.unique().tolist()) - set(chosen.unique().tolist())))
            return (
                logits,
                weights.where(~changed, _weights(scores, taken, sums_to_one).to(weights.dtype)),
                taken,
                *output[3:],
            )

        return hook

    @torch.no_grad()
    def _sums_to_one(self, router: Any, num_experts: int) -> bool:
        """Whether the weights of the chosen experts do; tried out."""
        weight = getattr(router, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or len(weight) != num_experts:
            raise self._refusal("its router is no linear layer with a row for each expert")
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(_PROBES, weight.shape[1], generator=generator) / float(weight.float().norm(dim=1).mean())
        try:
            logits, weights, chosen = router(inputs.to(weight))[:3]
            scores = logits.float()
            best = scores.topk(chosen.shape[-1], dim=-1).values
            if logits.shape == (_PROBES, num_experts) and _close(
                scores.gather(-1, chosen).sort(-1).values, best.flip(-1)
            ):
                for sums_to_one in (True, False):
                    if _close(_weights(scores, chosen, sums_to_one), weights.float()):
                        return sums_to_one
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise self._refusal(f"its router cannot be tried out ({' '.join(str(error).split())})") from error
        raise self._refusal("its router does more than to take the best of a softmax")

    def _refusal(self, reason: str) -> PolicyError:
        return PolicyError(f'fallback "cache-prior" cannot serve the "{self._family}" family: {reason}')


def _weights(logits: torch.Tensor, chosen: torch.Tensor, sums_to_one: bool) -> torch.Tensor:
    """What the unchanged logits say of the experts `chosen` [T, K]."""
    weights = logits.softmax(-1).gather(-1, chosen)
    return weights / weights.sum(-1, keepdim=True) if sums_to_one else weights


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * float(b.abs().max()) / 10)
