"""A recorded trace in place of a model's own routing: live runs with real locality, for tests and benchmarks.

A random checkpoint routes at random, which no cache policy can be judged by. Under a `TraceRouter` its tokens go where
a trace says, in that trace's weights; all else, the experts' arithmetic included, stays the model's own. It works by
hooks on the modules, and so on a plain transformers model too: the two can be compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle, islice
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cache.errors import TraceError
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.skeleton import count_experts, find_experts
from offload.decide.rules import Rules


class RoutedTrace(Protocol):
    """What the router reads of a trace; `cache.traces.trace.Trace` is one."""

    @property
    def experts(self) -> NDArray[np.unsignedinteger[Any]]:
        """Ids [T, L, K], in descending router weight."""

    @property
    def weights(self) -> NDArray[np.floating[Any]]:
        """The router's weights [T, L, K]."""

    @property
    def sequence_offsets(self) -> NDArray[np.int64]:
        """int64 [S + 1]: sequence s is the tokens from sequence_offsets[s] to sequence_offsets[s + 1]."""

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""


class Parts(Protocol):
    """What the router needs of the parts of an `OffloadedModel`."""

    @property
    def experts(self) -> ExpertMap:
        """Where the experts are."""


class Offloaded(Protocol):
    """What the router needs of an `OffloadedModel`."""

    @property
    def module(self) -> Any:
        """The transformers model inside."""

    @property
    def parts(self) -> Parts: ...

    @property
    def closed(self) -> bool: ...

    @property
    def rules(self) -> Rules: ...

    def use_predictor(self, predictor: str, *, prefetcher: str = ..., depth: int | None = None) -> None: ...


class TraceRouter:
    """Routes `model` by `trace` while its `with` block runs; afterwards the model is as before.

    `model` is an OffloadedModel or a transformers model. `layers` says which layer of the trace each MoE layer of the
    model follows, such as range(6) for a model of 6; by default they must be as many. Each sequence of a batch follows
    one of the trace, the next not yet taken, from `first_sequence` on; a pass of n tokens a sequence (a prompt is one
    of many, padding included) follows its next n tokens. A sequence begins where a pass has nothing before it. Where
    the trace's ends, `at_end` "next" goes on with the next not taken (after the last the first comes again), and
    "error" raises TraceError.

    Nothing is fetched ahead meanwhile, unless a predictor was named: what the model's own gates say has nothing to do
    with the trace.

    Raises TraceError for a trace of another shape than the model, at once or, for `top_k`, in the first pass.
    """

    def __init__(
        self,
        model: Offloaded | nn.Module,
        trace: RoutedTrace,
        *,
        layers: Sequence[int] | None = None,
        first_sequence: int = 0,
        at_end: Literal["next", "error"] = "next",
    ) -> None:
        self._trace = trace
        self._at_end = at_end
        self._offloaded = None if isinstance(model, nn.Module) else model
        self._model, self._modules = _experts_modules(model)
        self._layers = self._checked(layers)
        sequences = len(trace.sequence_offsets) - 1
        if not 0 <= first_sequence < sequences:
            raise TraceError(f"the trace has the sequences 0 to {sequences - 1}, and no {first_sequence}")
        order = (*range(first_sequence, sequences), *range(first_sequence))
        self._untaken = cycle(order)
        self._rows: list[Iterator[int]] = []
        self._experts = self._weights = torch.empty(0)
        self._hooks = ExitStack()

    def __enter__(self) -> TraceRouter:
        # What is inside the head: a pass of `generate` is cut into several outside of it.
        inside = getattr(self._model, "base_model", self._model)
        for handle in (
            inside.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            *(module.register_forward_pre_hook(self._before(i)) for i, (module, _) in enumerate(self._modules)),
        ):
            self._hooks.callback(handle.remove)
        if self._offloaded is not None:
            self._pause(self._offloaded)
        return self

    def _pause(self, offloaded: Offloaded) -> None:
        rules = offloaded.rules
        if rules.optional and rules.predictor != "none":
            offloaded.use_predictor("none")
            self._hooks.callback(self._resume, offloaded, offloaded.rules, rules)

    def _resume(self, offloaded: Offloaded, paused: Rules, before: Rules) -> None:
        """Predict as before, unless somebody has chosen meanwhile, or the model is closed."""
        if offloaded.rules is paused and not offloaded.closed:
            offloaded.use_predictor("auto", prefetcher=before.prefetcher, depth=before.prefetch_depth)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.close()

    def _checked(self, layers: Sequence[int] | None) -> list[int]:
        """The trace's layer of each of the model's."""
        ours, theirs = len(self._modules), self._trace.experts.shape[1]
        if layers is None:
            if ours != theirs:
                raise TraceError(
                    f"the trace has {theirs} MoE layers, the model {ours}: choose {ours} of them with layers=..., "
                    f"such as range({ours})"
                )
            layers = range(theirs)
        if len(layers) != ours or not all(0 <= layer < theirs for layer in layers):
            raise TraceError(
                f"layers={list(layers)}: the model's {ours} MoE layers need one each of the trace's layers "
                f"0 to {theirs - 1}"
            )
        for _, num_experts in self._modules:
            if num_experts != self._trace.num_experts:
                raise TraceError(
                    f"the trace has {self._trace.num_experts} experts a layer, the model {num_experts}: "
                    "record one with this model's shape"
                )
        return list(layers)

    def _tokens(self) -> Iterator[int]:
        """The tokens that one sequence follows."""
        offsets = self._trace.sequence_offsets
        for sequence in self._untaken:
            yield from range(int(offsets[sequence]), int(offsets[sequence + 1]))
            if self._at_end == "error":
                raise TraceError(
                    f"sequence {sequence} of the trace ends after {offsets[sequence + 1] - offsets[sequence]} tokens: "
                    'generate fewer, or go on with the next sequence with at_end="next"'
                )

    def _before_pass(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        sequences, new = next(value for value in given if value is not None).shape[:2]
        past = kwargs.get("past_key_values")
        if past is None or past.get_seq_length() == 0 or not self._rows:
            self._rows = [self._tokens() for _ in range(sequences)]
        if sequences != len(self._rows):
            raise TraceError(f"{sequences} sequences go on where {len(self._rows)} began: no trace says how")
        tokens = [token for row in self._rows for token in islice(row, new)]
        # Copied, since a trace on disk is mapped read-only; ids as wide as torch's.
        self._experts = torch.from_numpy(self._trace.experts[tokens][:, self._layers].astype(np.int64))
        self._weights = torch.from_numpy(self._trace.weights[tokens][:, self._layers].astype(np.float32))

    def _before(self, layer: int) -> Any:
        def replaced(
            module: Any, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            hidden_states, top_k_index, top_k_weights = args
            experts, weights = self._experts[:, layer], self._weights[:, layer]
            if experts.shape != top_k_index.shape:
                raise TraceError(
                    f"the trace has {experts.shape[0]} tokens with {experts.shape[1]} experts each for this pass, "
                    f"the model routes {top_k_index.shape[0]} to {top_k_index.shape[1]}: they do not belong together"
                )
            return hidden_states, experts.to(top_k_index), weights.to(top_k_weights)

        return replaced


def _experts_modules(model: Offloaded | nn.Module) -> tuple[nn.Module, list[tuple[nn.Module, int]]]:
    """The transformers model, and its routed-experts modules in layer order with their numbers of experts."""
    if isinstance(model, nn.Module):
        return model, [(module, count_experts(module)) for module in find_experts(model).values()]
    inner: nn.Module = model.module  # its modules have given up the parameters that would tell
    return inner, [(inner.get_submodule(layer.path), layer.num_experts) for layer in model.parts.experts.layers]
