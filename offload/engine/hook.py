"""The one hook: our `experts_implementation`, registered through transformers' public ExpertsInterface.

It serves every family that follows the interface, through the module's own flags and its own `_apply_gate`, and
computes what transformers' `grouped_mm` computes, bit for bit on the CPU: see `offload/engine/outputs.py`.
"""

from __future__ import annotations

from contextlib import closing, nullcontext
from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface

from offload.engine.host import Job
from offload.engine.outputs import Outputs, compute_expert
from offload.engine.pairs import Pairs, ask_tokens, rescaled
from offload.engine.protocols import HANDLE
from offload.formats.cpu import threads as own_threads
from offload.store.base import Weights

IMPLEMENTATION = "offload"
_TOGETHER = 8  # experts of several tokens in one call: what lands meanwhile waits for its end


def offload_experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H].

    Raises TransferError when an expert cannot be read. Side effects: the caches change as the manager decides.
    """
    # Being left out by the compiler costs microseconds a layer, so only where there is one.
    forward = _left_out if torch.compiler.is_compiling() else _forward
    result: torch.Tensor = forward(module, hidden_states, top_k_index, top_k_weights)
    return result


def _forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    runtime, layer = getattr(module, HANDLE)
    if runtime.recorder is not None:
        runtime.recorder.record(layer.index, top_k_index, top_k_weights)
    if runtime.fused is not None:
        fused: torch.Tensor | None = runtime.fused(layer, module, hidden_states, top_k_index, top_k_weights)
        if fused is not None:
            return fused
    # Torch's threads would watch for work on the processors that ours compute on.
    alone = 1 < len(top_k_index) <= runtime.own_rows
    with own_threads.alone() if alone else nullcontext():
        return _compute(runtime, layer, module, hidden_states, top_k_index, top_k_weights)


def _compute(
    runtime: Any,
    layer: Any,
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    num_tokens, num_top_k = top_k_index.shape
    kept = ask_tokens(runtime, layer.index, top_k_index, top_k_weights)
    pairs = Pairs.of(top_k_index, top_k_weights, kept)
    if kept is not None and runtime.by_token.renormalise:
        top_k_weights = rescaled(top_k_weights, kept)
    experts = pairs.experts
    outputs = Outputs(module, hidden_states, num_top_k, pairs.order, pairs.spans, pairs.dropped)
    beside = _Beside(module, hidden_states, outputs)
    together = num_top_k if num_tokens == 1 else _TOGETHER
    with closing(runtime.run(layer, experts, pairs.totals, pairs.tokens, beside.job, together=together)) as available:
        for group in available:
            outputs.compute(group)
    for expert, y in beside.outputs.items():
        outputs.put(expert, y.to(hidden_states.device))
    if runtime.observer is not None and outputs.y is not None:
        for expert in experts:
            if expert not in outputs.missing:
                places = outputs.places(expert)
                weights = top_k_weights.reshape(-1)[places]
                runtime.observer(layer.index, expert, outputs.y[places], weights, outputs.rows(expert))
    return outputs.sum(top_k_weights)


_left_out = torch.compiler.disable(_forward)


class _Beside:
    """What the CPU computes of a layer while the accelerator computes the rest: `outputs` [M, H] by expert.

    Every expert's rows are its own, and the sum over them comes when all are there: who was faster makes no difference.
    """

    def __init__(self, module: Any, hidden: torch.Tensor, members: Outputs) -> None:
        self.outputs: dict[int, torch.Tensor] = {}
        self._module, self._hidden, self._members = module, hidden, members
        self._on_host: torch.Tensor | None = None

    def job(self, expert: int, weights: Weights) -> Job:
        """The work on one expert, whose parameters are in host memory. The first one brings the rows there."""
        if self._on_host is None:
            self._on_host = self._hidden.to("cpu")
        rows = self._on_host[self._members.rows(expert).to("cpu")]

        def compute() -> None:
            self.outputs[expert] = compute_expert(self._module, rows, weights)

        return compute


ExpertsInterface.register(IMPLEMENTATION, offload_experts_forward)
