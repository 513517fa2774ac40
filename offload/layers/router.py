"""Routers: where they are, how alike experts are to them, and their scores, caught as the model computes them.

transformers' routers return their logits beside what they chose. Some choose by them, some by a function of them plus
a correction bias. Which it is, is found out from the router's code and the first pass, and verified on every one: the
chosen experts must be those of the highest scores. What cannot be verified is refused, never guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cache.errors import PolicyError, TraceError
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.layers.instead import original

_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
}
_SPREAD = 0.05  # the weights are rounded to the model's dtype, and a wrong function misses by far more
_SLACK = 1e-3  # relative; a bias is added in another order or precision here


def family_of(model: Any) -> str:
    """What errors call the model's family."""
    return str(getattr(model.config, "model_type", type(model).__name__))


def router_beside(model: nn.Module, layer: ExpertLayer) -> tuple[nn.Module, nn.Module | None]:
    """The block that holds the layer's experts, and its router, if it has one."""
    parent = model.get_submodule(layer.path.rpartition(".")[0])
    router = next((getattr(parent, name) for name in ("gate", "router") if hasattr(parent, name)), None)
    return parent, router if isinstance(router, nn.Module) else None


def gate_similarity(model: nn.Module, experts: ExpertMap) -> NDArray[np.float32]:
    """The cosine of every two rows of each layer's gate [L, E, E]; -1 for experts that a layer does not have.

    Raises PolicyError, naming the family, where a gate has no row for each expert.
    """
    similarity = np.full((len(experts.layers), experts.num_experts, experts.num_experts), -1, np.float32)
    for layer in experts.layers:
        weight = getattr(router_beside(model, layer)[1], "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or len(weight) != layer.num_experts:
            raise PolicyError(
                f'fallback "buddy" cannot serve the "{family_of(model)}" family: '
                f"the router beside {layer.path} is no linear layer with a row for each expert"
            )
        rows = functional.normalize(weight.detach().float(), dim=1)
        similarity[layer.index, : len(rows), : len(rows)] = (rows @ rows.t()).cpu().numpy()
    return similarity


def half_precision(scores: torch.Tensor) -> NDArray[np.float16]:
    """`scores` as a trace keeps them; what is finite stays so."""
    limit = torch.finfo(torch.float16).max
    finite = scores.where(scores.isinf(), scores.clamp(-limit, limit))
    halves: NDArray[np.float16] = finite.to("cpu", torch.float16).numpy()
    return halves


class RouterScores:
    """While attached, hands every MoE layer's scores, float32 [tokens, experts], to `receive(layer, scores)`.

    `function` is what makes router weights of the scores: "softmax", "sigmoid", or "none" where a bias was added after
    the function; None before the first pass. Raises TraceError, naming the family, where routers are not found or what
    they select on is not known.
    """

    def __init__(self, model: nn.Module, experts: ExpertMap, receive: Callable[[int, torch.Tensor], object]) -> None:
        self.function: str | None = None
        self._family = family_of(model)
        self._receive = receive
        self._kind: tuple[str, bool] | None = None  # the function, and whether the bias is added to the logits
        self._possible = set(_FUNCTIONS)
        routers = []
        for layer in experts.layers:
            parent, router = router_beside(model, layer)
            if router is None:
                raise self._refusal(f"{layer.path} has no router beside it")
            if hasattr(router, "tid2eid"):
                raise self._refusal("it picks experts from a table, not by scores")
            if groups(router) > 1:
                raise self._refusal(f"its router leaves out some of its {groups(router)} groups of experts first")
            self._possible &= _named_functions(router)
            routers.append((layer.index, layer.num_experts, parent, router))
        self._hooks = [
            # Before any hook that has the router choose otherwise.
            router.register_forward_hook(self._hook(index, num_experts, _bias(parent, router)), prepend=True)
            for index, num_experts, parent, router in routers
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, layer: int, num_experts: int, bias: torch.Tensor | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            logits, weights, chosen = output[:3]
            if logits.shape[-1] != num_experts or chosen.shape[:-1].numel() != logits.shape[:-1].numel():
                raise self._refusal(f"its router gives logits of shape {tuple(logits.shape)}")
            self._receive(
                layer, self._scores(logits.flatten(0, -2).float(), weights.flatten(0, -2).float(), chosen, bias)
            )

        return hook

    def _scores(
        self, logits: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < 1e-3).all()):
            # Probabilities already, however they are scaled afterwards.
            logits, weights = logits.log(), logits.gather(-1, chosen.flatten(0, -2))
        chosen = chosen.flatten(0, -2)
        for function, name, scores in self._candidates(logits, weights, chosen, bias):
            if _are_highest(scores, chosen):
                if self._kind is None:
                    self._kind, self.function = (function, name == "none"), name
                return scores
        raise self._refusal("the experts it chooses are not those of the highest scores")

    def _candidates(
        self, logits: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, bias: torch.Tensor | None
    ) -> Iterator[tuple[str, str, torch.Tensor]]:
        """What may have been selected on: (function, what makes weights of the scores, scores)."""
        if self._kind is not None:
            functions = [self._kind[0]]
        else:
            spreads = {name: _spread(weights, _FUNCTIONS[name](logits).gather(-1, chosen)) for name in self._possible}
            functions = [name for name, spread in spreads.items() if spread < _SPREAD]
            if len(functions) > 1:
                raise self._refusal(f"whether its weights come from {' or '.join(functions)} cannot be told")
        for function in functions:
            if bias is None:
                yield function, function, logits
                continue
            if self._kind is None or self._kind[1]:
                yield function, "none", _FUNCTIONS[function](logits) + bias.float()
            if self._kind is None or not self._kind[1]:
                yield function, function, logits + bias.float()

    def _refusal(self, reason: str) -> TraceError:
        return TraceError(
            f'the router scores of the "{self._family}" family cannot be recorded: {reason}; record without scores'
        )


def _named_functions(router: nn.Module) -> set[str]:
    """The functions that the router's code names, if it names just one: near-even weights do not tell them apart."""
    try:
        code = inspect.getsource(original(type(router)).forward)
    except (OSError, TypeError):
        return set(_FUNCTIONS)
    named = {name for name in _FUNCTIONS if name in code}
    return named if len(named) == 1 else set(_FUNCTIONS)


def groups(router: Any) -> int:
    """Into how many groups the router sorts experts before it leaves some out; 1 if it leaves none out."""
    number, kept = getattr(router, "num_group", None) or 1, getattr(router, "topk_group", None) or 1
    return int(number) if number > kept else 1


def _bias(parent: nn.Module, router: nn.Module) -> torch.Tensor | None:
    """The correction bias that is added before experts are chosen."""
    for holder in (router, getattr(router, "moe_statics", None), parent):
        for name in _BIASES:
            if isinstance(bias := getattr(holder, name, None), torch.Tensor):
                return bias.flatten()
    return None


def _spread(weights: torch.Tensor, values: torch.Tensor) -> float:
    """How far `values` [T, K] are from being `weights` times a factor for each token; 0 for equal up to that."""
    factor = values.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    return float(((weights * factor - values).abs() / values.abs().amax(-1, keepdim=True)).nan_to_num(1.0).max())


def _are_highest(scores: torch.Tensor, chosen: torch.Tensor) -> bool:
    """Whether no expert that was not chosen has a higher score than one that was."""
    lowest = scores.gather(-1, chosen).amin(-1)
    others = scores.scatter(-1, chosen, float("-inf")).amax(-1)
    return bool((others <= lowest + _SLACK * lowest.abs().clamp(min=1e-3)).all())
