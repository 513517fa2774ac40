"""What a model's output owes to an expert: found by watching what experts give, and by taking the least one away.

Three measures, each for a rule that degrades experts:

- the largest number an expert ever gave, by which super experts are known (arXiv:2507.23279);
- how much the next token's distribution changes when a layer's lowest-weighted expert is dropped, for AdapMoE's rule
  (2408.10284). It is a KL divergence from the model as it is: the increase of the loss to second order, as AdapMoE's
  is, but without gradients, and never below zero, so that a few hundred tokens are enough;
- what it would cost to lose an expert's output in noise, for a static assignment of bits (EdgeMoE, 2308.14352): the
  energy that it adds, at the price that the change by a dropped expert had in its layer.

Energies are relative to that of the residual stream, before or after the layer's block, whichever is larger: what
comes next is normalised, so an output counts by how much it turns the stream. The few outputs that make or take back a
massive activation would otherwise outweigh all others together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cache.errors import ContextError, TraceError
from offload.checkpoint.layout import ExpertLayer, ExpertMap
from offload.engine.runtime import ExpertRuntime
from offload.model import OffloadedModel
from offload.quality.logits import divergence, pass_logits

SPAN = 64
"""Tokens that are read together. Shorter ones have less context, longer ones leave fewer layers for one pass."""
_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


class ExpertOutputs:
    """While attached, notes the largest number that every expert gave, and the energy it added to the residual stream.

    Raises TraceError for a model whose layers are not found.
    """

    def __init__(self, model: nn.Module, runtime: ExpertRuntime, experts: ExpertMap) -> None:
        shape = len(experts.layers), experts.num_experts
        self.maxima: NDArray[np.float32] = np.zeros(shape, np.float32)
        """[L, E]: the largest absolute value, before the weight."""
        self.energy: NDArray[np.float64] = np.zeros(shape, np.float64)
        """[L, E]: the squared length of the weighted output over that of the stream, summed over tokens."""
        self._given: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # expert, tokens, energies
        self._runtime = runtime
        self._hooks = [
            _block(model, layer).register_forward_hook(self._end(layer.index), with_kwargs=True)
            for layer in experts.layers
        ]
        runtime.observer = self._see

    def detach(self) -> None:
        """Watch no more."""
        self._runtime.observer = None
        for hook in self._hooks:
            hook.remove()

    def _see(self, layer: int, expert: int, output: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor) -> None:
        output = output.float()
        self.maxima[layer, expert] = max(self.maxima[layer, expert], float(output.abs().max()))
        self._given.append((expert, tokens, output.square().sum(-1) * weights.float().square()))

    def _end(self, layer: int) -> Any:
        def hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            stream = _stream_energy(args, kwargs, output)
            for expert, tokens, energy in self._given:
                self.energy[layer, expert] += float((energy / stream[tokens]).sum())
            self._given.clear()

        return hook


class LayerSensitivity:
    """Sums over tokens, by layer, of what dropping the lowest-weighted expert does: its weight goes to the others with
    `renormalise`, and to nobody without. A fallback goes by what was measured as it drops itself."""

    def __init__(self, layers: int, *, renormalise: bool = True) -> None:
        self.tokens = 0
        self._renormalise = renormalise
        self._kl, self._share2, self._change = np.zeros((3, layers))
        self._changes: dict[int, torch.Tensor] = {}  # by layer, of every token, until its block ends

    @property
    def weight(self) -> NDArray[np.float32]:
        """[L]: AdapMoE's w_l. Dropping an expert that has the share a of a token's weights costs a^2 w_l nats."""
        return _ratio(self._kl, self._share2)

    def importance(self, outputs: ExpertOutputs, tokens: int) -> NDArray[np.float32]:
        """[L, E]: nats lost per token, to first order, if an expert gave noise as large as its output; seen over
        `tokens` tokens. The price of energy is what the changes by dropped experts cost in the same layer."""
        price = _ratio(self._kl, self._change)
        return (price[:, None] * outputs.energy / tokens).astype(np.float32)

    def measure(
        self, model: OffloadedModel, sequences: Sequence[Sequence[int]], tokens: int, done: Callable[[int], object]
    ) -> None:
        """Read the first `tokens` tokens of `sequences`, `SPAN` of each in turn; calls `done` with tokens read.

        One pass takes a span as many times as it has room for: once as it is, and once for each of some layers, with
        the expert dropped there. So experts are streamed a few times and not once a layer. Raises ContextError where
        there is room for one only.
        """
        layers = model.parts.experts.layers
        room = min(model.plan.chunk, model.context)
        span = min(SPAN, room // 2)
        if span < 1:
            raise ContextError(f"a context of {model.context} tokens is too short to measure in: raise --context")
        at_once = room // span - 1
        pieces = [piece for sequence in sequences for piece in torch.tensor(list(sequence)).split(span)]
        for piece in pieces:
            piece = piece[: tokens - self.tokens]
            if not len(piece):
                break
            for first in range(0, len(layers), at_once):
                self._measure(model, piece.to(model.device), layers[first : first + at_once])
            self.tokens += len(piece)
            done(len(piece))

    def _measure(self, model: OffloadedModel, ids: torch.Tensor, layers: Sequence[ExpertLayer]) -> None:
        with self._dropping(model.module, layers, len(ids)):
            blocks, _ = pass_logits(model, ids.repeat(1 + len(layers), 1), None)
            for logits in blocks:
                p, *others = (functional.log_softmax(rows.double(), -1) for rows in logits)
                for layer, q in zip(layers, others, strict=True):
                    self._kl[layer.index] += divergence(p, q)

    @contextmanager
    def _dropping(self, model: Any, layers: Sequence[ExpertLayer], tokens: int) -> Iterator[None]:
        """Row i + 1 of a batch of `tokens` columns goes without its lowest-weighted experts in the i-th of `layers`."""
        hooks = []
        for row, layer in enumerate(layers, 1):
            module = model.get_submodule(layer.path)
            rows = slice(row * tokens, (row + 1) * tokens)
            hooks += [
                module.register_forward_pre_hook(self._drop(layer.index, rows), with_kwargs=True),
                module.register_forward_hook(self._compare(layer.index, rows)),
                _block(model, layer).register_forward_hook(self._end(layer.index), with_kwargs=True),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _drop(self, layer: int, rows: slice) -> Any:
        def hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
            given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
            weights = given["top_k_weights"].clone()
            mine = weights[rows]
            total, lowest = mine.sum(-1, keepdim=True), mine.argmin(-1, keepdim=True)
            self._share2[layer] += float((mine.gather(-1, lowest) / total).double().square().sum())
            mine.scatter_(-1, lowest, 0)
            if self._renormalise:
                rest = mine.sum(-1, keepdim=True)
                mine *= torch.where(rest > 0, total / rest, 0)
            return (), {**given, "top_k_weights": weights}

        return hook

    def _compare(self, layer: int, rows: slice) -> Any:
        def hook(module: object, args: object, output: torch.Tensor) -> None:
            output = output.reshape(-1, output.shape[-1])
            intact = output[: rows.stop - rows.start]  # the first row of the batch had the same input
            self._changes[layer] = (output[rows].float() - intact.float()).square().sum(-1)

        return hook

    def _end(self, layer: int) -> Any:
        def hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            changes = self._changes.pop(layer)
            self._change[layer] += float((changes / _stream_energy(args, kwargs, output)[: len(changes)]).sum())

        return hook


def _block(model: nn.Module, layer: ExpertLayer) -> nn.Module:
    """The block of the model that a MoE layer belongs to. Raises TraceError."""
    path = layer.path
    while path:
        path, _, _ = path.rpartition(".")
        above, _, _ = path.rpartition(".")
        if path and isinstance(model.get_submodule(above), nn.ModuleList):
            return model.get_submodule(path)
    raise TraceError(f"{layer.path} is in no list of layers: what its experts matter cannot be measured")


def _stream_energy(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor:
    """[tokens]: the squared length of the residual stream before or after a block, whichever is larger."""
    before = args[0] if args else kwargs["hidden_states"]
    after = output if isinstance(output, torch.Tensor) else output[0]
    energies = [stream.detach().float().square().sum(-1).flatten() for stream in (before, after)]
    return torch.maximum(*energies).clamp_min(torch.finfo(torch.float32).tiny)


def _ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0).clip(min=0).astype(np.float32)
