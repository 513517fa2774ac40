"""What the next layers' gates would choose for the input of the present one, asked while the model runs.

Neighbouring layers change the hidden state little, so the gates of layers l + 1, l + 2, ... mostly choose for the input
of gate l what they will choose for their own: the look ahead of mixtral-offloading (arXiv:2312.17238), HOBBIT
(2411.01433) and Fate (2502.12224), and, with `offsets`, of DALI (2602.03495). The model's own router modules are asked,
whatever they compute; nothing of them is imitated. Most routers are one product with a weight, and the scores' order is
the answer: where a router is found to be that, its product is all that is computed. The weights are not stacked for
one product, which would be faster by another fifth but keep a second copy of every router in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cache.errors import TraceError
from cache.traces.trace import expert_dtype
from offload.checkpoint.layout import ExpertMap
from offload.layers.router import family_of, groups, router_beside

_PROBES = 64  # inputs on which a router must answer as its weight alone does, to be asked by its weight alone

Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Scores [tokens, E], weights [tokens, K] and ids [tokens, K] of the chosen experts."""


class _Router(NamedTuple):
    layer: int
    parent: nn.Module
    module: Any
    parameters: Sequence[inspect.Parameter]  # of its forward; the first is the input


class GateLookahead:
    """While attached, hands over what the gates of the next layers say of every MoE layer's gate input.

    `receive(layer, predicted)` gets ids [tokens, D', P] before the layer's experts run, the likeliest first: what each
    router chose by descending weight, then others by its scores. D' is `depth` or the number of layers that follow,
    where there are fewer; the last layer says nothing. P is twice the experts a token goes to, or all there are.
    `offsets` [L - 1, H] say how much the input changes on average from one gate to the next
    (`offload.layers.calibration`); those of all layers on the way are added to it. Nobody is asked while it is not
    `wanted`.

    Nothing of the model changes but for the hooks. Raises TraceError, naming the family, for routers that are not found
    or cannot be asked, here or in the first pass. With `refused` it is that which is told in that pass, whatever the
    router raised, and nobody is asked any more.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: ExpertMap,
        depth: int,
        receive: Callable[[int, NDArray[np.unsignedinteger[Any]]], object],
        *,
        offsets: NDArray[np.floating[Any]] | None = None,
        wanted: Callable[[], bool] = lambda: True,
        refused: Callable[[Exception], object] | None = None,
    ) -> None:
        if depth < 1:
            raise ValueError(f"a look {depth} layers ahead")
        self._family = family_of(model)
        self._num_experts = experts.num_experts
        self._receive = receive
        self._wanted = wanted
        self._refused = refused
        self._dtype = expert_dtype(experts.num_experts)
        self._plain: dict[int, bool] = {}  # by layer: whether its weight alone gives its answer
        self._top_k = 0
        self._asked: set[int] = set()  # layers whose routers are known to stay as they are
        self._offsets = None if offsets is None else torch.from_numpy(np.array(offsets, np.float32))
        self._shifts: dict[tuple[int, int], torch.Tensor] = {}
        if len({layer.num_experts for layer in experts.layers}) > 1:
            raise self._refusal("its layers have different numbers of experts")
        routers = []
        for layer in experts.layers:
            parent, module = router_beside(model, layer)
            if module is None:
                raise self._refusal(f"{layer.path} has no router beside it")
            routers.append(_Router(layer.index, parent, module, _parameters(module)))
        self._hooks = [
            router.module.register_forward_pre_hook(
                self._hook(router, routers[i + 1 : i + 1 + depth]), with_kwargs=True
            )
            for i, router in enumerate(routers[:-1])
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, router: _Router, following: Sequence[_Router]) -> Callable[..., None]:
        names = [parameter.name for parameter in router.parameters]

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._wanted():
                return
            try:
                given = dict(zip(names, args, strict=False)) | kwargs
                hidden: torch.Tensor = given.pop(names[0])
                inputs = [self._shifted(hidden, router.layer, other.layer) for other in following]
                likeliest = self._chosen_by(following, inputs, given)
            except Exception as error:
                if self._refused is None:
                    raise
                self.detach()
                self._refused(error)
                return
            self._receive(router.layer, likeliest.cpu().numpy().astype(self._dtype))

        return hook

    def _chosen_by(
        self, following: Sequence[_Router], inputs: Sequence[torch.Tensor], given: dict[str, Any]
    ) -> torch.Tensor:
        """What each of the next routers would choose for its input [..., H]: ids [tokens, routers, P]."""
        if all(self._is_plain(other, inputs[0]) for other in following):
            scores = torch.stack([_product(other, x) for other, x in zip(following, inputs, strict=True)], 1)
            chosen = scores.topk(self._top_k).indices
        else:
            answers = [self._ask(other, x, given) for other, x in zip(following, inputs, strict=True)]
            scores, weights, chosen = (torch.stack(tensors, 1) for tensors in zip(*answers, strict=True))
            chosen = _by_weight(weights, chosen)
        return _likeliest(scores, chosen)

    def _shifted(self, hidden: torch.Tensor, layer: int, other: int) -> torch.Tensor:
        """The input [..., H] of `layer`'s gate, moved by what it changes on average on the way to `other`'s."""
        if self._offsets is None:
            return hidden
        key = (layer, other)
        if key not in self._shifts:
            self._shifts[key] = self._offsets[layer:other].sum(0).to(hidden)
        return hidden + self._shifts[key]

    def _is_plain(self, router: _Router, hidden: torch.Tensor) -> bool:
        """Whether the router's answers are those of a product with its weight; found out once, on random inputs."""
        if router.layer not in self._plain:
            self._plain[router.layer] = self._agrees_with_its_weight(router, hidden)
        return self._plain[router.layer]

    def _agrees_with_its_weight(self, router: _Router, hidden: torch.Tensor) -> bool:
        module = router.module
        tensors = [*module.named_parameters(), *module.named_buffers()]
        names = {name for name, _ in tensors}
        if not {"weight"} <= names <= {"weight", "bias"} or len(router.parameters) > 1 or groups(module) > 1:
            return False
        # As large as the real input: what a router does to large scores would show. The global generator stays.
        noise = torch.randn(_PROBES, hidden.shape[-1], generator=torch.Generator().manual_seed(0))
        probes = (noise * float(hidden.float().std(correction=0))).to(hidden)
        scores, weights, chosen = self._ask(router, probes.view(*[1] * (hidden.dim() - 2), *probes.shape), {})
        product = _product(router, probes)
        self._top_k = chosen.shape[-1]
        return torch.equal(scores.float(), product.float()) and torch.equal(
            _by_weight(weights, chosen), product.topk(self._top_k).indices
        )

    def _ask(self, router: _Router, hidden: torch.Tensor, given: dict[str, Any]) -> Answer:
        """The router's answer. Not through its `__call__`: others' hooks on it would take it for the real one."""
        before = None if router.layer in self._asked else _versions(router)
        output = router.module.forward(hidden, **self._arguments(router, given))
        if before is not None and _versions(router) != before:
            raise self._refusal("its router changes when it is asked")
        self._asked.add(router.layer)
        if not isinstance(output, tuple) or len(output) < 3:
            raise self._refusal("its router does not give scores, weights and experts")
        tokens = hidden.shape[:-1].numel()
        scores, weights, chosen = (tensor.reshape(tokens, -1) for tensor in output[:3])
        if scores.shape[-1] < self._num_experts or weights.shape != chosen.shape:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (scores, weights, chosen))
            raise self._refusal(f"its router gives {shapes} for {tokens} tokens")
        return scores[:, : self._num_experts], weights, chosen  # classes beyond are no experts

    def _arguments(self, router: _Router, given: dict[str, Any]) -> dict[str, Any]:
        """What the router takes beside its input: tensors of its own block, else what the present router was given."""
        arguments = {}
        for parameter in router.parameters[1:]:
            name = parameter.name
            own = getattr(router.parent, name, None)
            if isinstance(own, torch.Tensor):
                arguments[name] = own
            elif name in given:
                arguments[name] = given[name]
            elif parameter.default is parameter.empty:
                raise self._refusal(f"its router also takes {name}, which is not known before its turn")
        return arguments

    def _refusal(self, reason: str) -> TraceError:
        return TraceError(f'the next gates of the "{self._family}" family cannot be asked ahead: {reason}')


def _parameters(module: Any) -> list[inspect.Parameter]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(module.forward).parameters.values() if p.kind not in variable]


def _product(router: _Router, hidden: torch.Tensor) -> torch.Tensor:
    module = router.module
    rows = hidden.reshape(-1, hidden.shape[-1]).to(module.weight.dtype)
    return functional.linear(rows, module.weight, getattr(module, "bias", None))


def _by_weight(weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """`chosen` by descending weight; equal ones stay as they are."""
    return chosen.gather(-1, weights.sort(dim=-1, descending=True, stable=True).indices)


def _likeliest(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The chosen experts [..., K], and as many others by descending score, where there are."""
    top_k = chosen.shape[-1]
    others = min(top_k, scores.shape[-1] - top_k)
    return torch.cat([chosen, scores.scatter(-1, chosen, float("-inf")).topk(others).indices], -1)


def _versions(router: _Router) -> list[tuple[int, int]]:
    """What changes when a tensor of the router or its block does."""
    tensors = (*router.module.parameters(), *router.module.buffers(), *router.parent.buffers(recurse=False))
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
