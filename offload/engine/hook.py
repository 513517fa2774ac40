"""The one hook: our `experts_implementation`, registered through transformers' public ExpertsInterface.

It serves every family that follows the interface, through the module's own flags and its own `_apply_gate`, and
computes what transformers' `grouped_mm` computes, bit for bit on the CPU: tokens sorted by expert, one linear layer per
expert and projection, every (token, k) result kept, weighted and reduced with one sum over k. In which order the
experts are computed does not matter to the result, so each is computed when its weights are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface

from offload.checkpoint.layout import ExpertLayer
from offload.engine.host import Job
from offload.engine.protocols import HANDLE
from offload.engine.runtime import ExpertRuntime
from offload.layers.autocast import uncast
from offload.layers.rows import row_products
from offload.store.base import Weights

IMPLEMENTATION = "offload"
_WHOLE_VECTORS = 128


def compute_expert(module: Any, hidden: torch.Tensor, weights: Weights) -> torch.Tensor:
    """One expert's products: hidden [M, H] -> [M, H], as `module` (an experts module) does; see `finish_expert`.

    The operations and their order are those of transformers' grouped_mm path, so that no bit differs.
    """
    up = "gate_up_proj" if module.has_gate else "up_proj"
    y = _linear(module, hidden, weights, up)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    return _linear(module, y, weights, "down_proj")


def compute_experts(module: Any, hidden: torch.Tensor, group: Sequence[Weights]) -> torch.Tensor:
    """A row of each of several experts at one precision: hidden [1, H] -> [len(group), H].

    The bits are those of `compute_expert` for each; what differs is that a step of all is one call, or few.
    """
    up = "gate_up_proj" if module.has_gate else "up_proj"
    y = _linear_each(module, hidden, group, up)
    gate = module._apply_gate if module.has_gate else module.act_fn
    # What a row has beyond whole vectors of the processor is computed otherwise, and must be at its end here, too.
    y = _joined([gate(row) for row in y.split(1)]) if y.shape[1] % _WHOLE_VECTORS else gate(y)
    return _linear_each(module, y, group, "down_proj")


def finish_expert(module: Any, y: torch.Tensor) -> torch.Tensor:
    """What some families do to an expert's output [M, H] with weights that lie where the dense ones do."""
    return module.post_expert_norm(y) if module.has_post_expert_norm else y


def _linear(module: Any, x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    weight = weights[name]
    with uncast(x):
        if isinstance(weight, torch.Tensor):
            y = torch.mm(x.to(weight.dtype), weight if module.is_transposed else weight.t())
        else:
            y = weight.linear(x)
    if module.has_bias:
        bias = weights[f"{name}_bias"]
        assert isinstance(bias, torch.Tensor)
        y.add_(bias)
    return y


def _linear_each(module: Any, x: torch.Tensor, group: Sequence[Weights], name: str) -> torch.Tensor:
    """x [1, K] or [len(group), K] -> [len(group), N]."""
    matrices: list[Any] = [weights[name] for weights in group]
    first = matrices[0]
    with uncast(x):
        if isinstance(first, torch.Tensor):
            y = row_products(x.to(first.dtype), matrices, module.is_transposed)
        else:
            y = first.linear_each(x, matrices)
    if module.has_bias:
        for weights, out in zip(group, y, strict=True):
            out.add_(weights[f"{name}_bias"])
    return y


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of one dtype, one below the other."""
    with uncast(rows[0]):
        return torch.cat(rows)


@torch.compiler.disable
def offload_experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H].

    Raises TransferError when an expert cannot be read. Side effects: the caches change as the manager decides.
    """
    runtime, layer = getattr(module, HANDLE)
    if runtime.recorder is not None:
        runtime.recorder.record(layer.index, top_k_index, top_k_weights)
    if runtime.fused is not None:
        fused: torch.Tensor | None = runtime.fused(layer, module, hidden_states, top_k_index, top_k_weights)
        if fused is not None:
            return fused
    num_tokens, num_top_k = top_k_index.shape
    if num_tokens == 1:
        experts = top_k_index[0].tolist()
        if len(set(experts)) == num_top_k:
            return _one_token(runtime, layer, module, hidden_states, experts, top_k_weights)
    sorted_ids, order = torch.sort(top_k_index.reshape(-1), stable=True)  # an expert's rows stay in token order
    rows = hidden_states[order // num_top_k]  # [T*K, H], grouped by expert
    row_weights = top_k_weights.reshape(-1)[order]  # [T*K]

    experts, tokens, spans = _groups(sorted_ids.tolist())
    totals = _totals(row_weights, spans)
    result: torch.Tensor | None = None
    skipped = set(experts)

    def keep(expert: int, y: torch.Tensor) -> None:
        nonlocal result
        start, end = spans[expert]
        y = finish_expert(module, y)
        if runtime.observer is not None:
            runtime.observer(layer.index, expert, y, row_weights[start:end], order[start:end] // num_top_k)
        if result is None:
            result = y.new_empty(len(order), y.shape[1])
        result[start:end] = y
        skipped.discard(expert)

    beside = _Beside(module, rows, spans)
    with closing(runtime.run(layer, experts, totals, tokens, beside.job)) as available:
        for ((expert, weights),) in available:
            start, end = spans[expert]
            keep(expert, compute_expert(module, rows[start:end], weights))
    for expert, y in beside.outputs.items():
        keep(expert, y.to(rows.device))
    if result is None:
        return torch.zeros_like(hidden_states)
    for expert in skipped:  # a fallback that may, left it out
        start, end = spans[expert]
        result[start:end] = 0

    del rows, beside  # a prompt's are large; the workspace does not count them twice
    weighted = result * row_weights.unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(num_tokens, num_top_k, -1).sum(dim=1).to(hidden_states.dtype)


def _one_token(
    runtime: ExpertRuntime,
    layer: ExpertLayer,
    module: Any,
    hidden_states: torch.Tensor,
    experts: list[int],
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """hidden_states [1, H], K experts, top_k_weights [1, K] -> [1, H]: the same sums without sorting rows, and what is
    there computed together."""
    beside = _Beside(module, hidden_states, dict.fromkeys(experts, (0, 1)))
    outputs: dict[int, torch.Tensor] = {}
    totals: list[float] = top_k_weights[0].tolist()
    with closing(runtime.run(layer, experts, totals, [1] * len(experts), beside.job, together=True)) as available:
        for group in available:
            y = compute_experts(module, hidden_states, [weights for _, weights in group])
            outputs.update(zip([expert for expert, _ in group], y.split(1), strict=True))
    for expert, y in beside.outputs.items():
        outputs[expert] = y.to(hidden_states.device)
    if not outputs:
        return torch.zeros_like(hidden_states)
    if module.has_post_expert_norm:
        outputs = {expert: finish_expert(module, y) for expert, y in outputs.items()}
    if runtime.observer is not None:
        token = torch.zeros(1, dtype=torch.long, device=hidden_states.device)
        for i, expert in enumerate(experts):
            if expert in outputs:
                runtime.observer(layer.index, expert, outputs[expert], top_k_weights[0, i : i + 1], token)
    if len(outputs) < len(experts):  # a fallback that may, left some out
        nothing = torch.zeros_like(next(iter(outputs.values())))
        outputs = {expert: outputs.get(expert, nothing) for expert in experts}
    result = _joined([outputs[expert] for expert in experts])  # [K, H]
    weighted = result * top_k_weights.view(-1, 1)
    return weighted.view(1, len(experts), -1).sum(dim=1).to(hidden_states.dtype)


class _Beside:
    """What the CPU computes of a layer while the accelerator computes the rest: `outputs` [M, H] by expert.

    Every expert's rows are its own, and the sum over them comes when all are there: who was faster makes no difference.
    """

    def __init__(self, module: Any, rows: torch.Tensor, spans: dict[int, tuple[int, int]]) -> None:
        self.outputs: dict[int, torch.Tensor] = {}
        self._module, self._rows, self._spans = module, rows, spans
        self._on_host: torch.Tensor | None = None

    def job(self, expert: int, weights: Weights) -> Job:
        """The work on one expert, whose parameters are in host memory. The first one brings the rows there."""
        if self._on_host is None:
            self._on_host = self._rows.to("cpu")
        start, end = self._spans[expert]
        rows = self._on_host[start:end]

        def compute() -> None:
            self.outputs[expert] = compute_expert(self._module, rows, weights)

        return compute


def _groups(ids: list[int]) -> tuple[list[int], list[int], dict[int, tuple[int, int]]]:
    """From sorted expert ids: the experts, their token counts, and the rows [start, end) of each."""
    spans: dict[int, tuple[int, int]] = {}
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] != ids[start]:
            spans[ids[start]] = (start, end)
            start = end
    return list(spans), [end - start for start, end in spans.values()], spans


def _totals(row_weights: torch.Tensor, spans: dict[int, tuple[int, int]]) -> list[float]:
    values: list[float] = row_weights.tolist()
    return [_sum(values[start:end]) for start, end in spans.values()]


def _sum(values: list[float]) -> float:
    """One by one, in order, as a replay does: `sum` compensates for rounding, from Python 3.12 on."""
    total = 0.0
    for value in values:
        total += value
    return total


ExpertsInterface.register(IMPLEMENTATION, offload_experts_forward)
