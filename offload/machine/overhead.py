"""What a layer and a pass take beyond reading and multiplying weights: a model of next to no weights, run as any is.

Its hidden states are as wide as a real model's, its experts and projections are slivers, and every expert is resident:
what its passes take is the interpreter, transformers' modules, the router, the decisions, and moving rows to their
experts and back. Models that differ in one thing tell layers and experts apart. Measured on one thread, since none of
this is work that several share.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from cache.types import Phase
from offload.costs.machine import Curve
from offload.device.base import Device
from offload.device.emulated import EmulatedDevice
from offload.machine.budget import Budget
from offload.machine.compute import ComputeProbe, weight_block
from offload.machine.threads import torch_threads
from offload.model import OffloadedModel
from offload.system.timing import rising, seconds

TOKENS = (1, 32, 512)
_HIDDEN, _INTERMEDIATE, _EXPERTS, _VOCAB = 2048, 16, 16, 256
_FEW_LAYERS, _MANY_LAYERS, _FEW_TOP_K, _MANY_TOP_K = 2, 6, 2, 8
_DECODED = 16  # tokens a sample
_WARMING = 128  # tokens
_SHARE = 3  # no pass takes more than this part of what is left
_PRODUCT_S = 0.05
_ONE_EXPERT_BYTES = 3 * _HIDDEN * _INTERMEDIATE * 2


@dataclass(frozen=True)
class Overhead:
    """Seconds: of a layer by tokens, of each expert of its event, of a pass."""

    layer: Curve
    expert_s: float
    pass_s: float


def measure_overhead(device: Device, tokens: Sequence[int], rounds: int, budget: Budget) -> Overhead:
    """Runs three tiny models on a device like `device`, in turns, up to so many rounds, as far as the budget goes.

    `tokens` begin with 1. Raises OffloadError.
    """
    with ExitStack() as stack:
        few, many, sparse = (
            stack.enter_context(_TinyModel(device, layers, top_k))
            for layers, top_k in ((_FEW_LAYERS, _MANY_TOP_K), (_MANY_LAYERS, _MANY_TOP_K), (_MANY_LAYERS, _FEW_TOP_K))
        )
        for model in (few, many, sparse):
            model.pass_s(_WARMING)  # every expert becomes resident
        times = _take((few, many, sparse), tokens, rounds, budget)
        experts = {n: many.experts_per_event[n] for n in times}
    few_s, many_s, sparse_s = (
        {n: median(each[which] for each in samples) for n, samples in times.items()} for which in range(3)
    )
    products = ComputeProbe(device, 1, weight_block(device, _ONE_EXPERT_BYTES))  # it stays in the processor's cache

    def products_s(tokens: int, experts: float) -> float:
        rows = max(round(tokens * _MANY_TOP_K / experts), 1)
        call = products.expert_call("bf16", (_HIDDEN, _INTERMEDIATE))
        with torch_threads(1), device.computing():
            return experts * budget.median_s(partial(call, rows), _PRODUCT_S)

    one_expert_s = (many_s[1] - sparse_s[1]) / _MANY_LAYERS / (_MANY_TOP_K - _FEW_TOP_K)
    expert_s = max(one_expert_s - products_s(1, _MANY_TOP_K) / _MANY_TOP_K, 0.0)
    one_layer_s = {n: (many_s[n] - few_s[n]) / (_MANY_LAYERS - _FEW_LAYERS) for n in times}
    return Overhead(
        layer=rising({n: max(one_layer_s[n] - products_s(n, experts[n]) - experts[n] * expert_s, 0.0) for n in times}),
        expert_s=expert_s,
        pass_s=max(few_s[1] - _FEW_LAYERS * one_layer_s[1], 0.0),
    )


def _take(
    models: Sequence[_TinyModel], tokens: Sequence[int], rounds: int, budget: Budget
) -> dict[int, list[list[float]]]:
    """Seconds of a pass of each model, by tokens, as many times as there are rounds and the budget has time for."""
    times, took = dict[int, list[list[float]]](), dict[int, float]()
    for _ in range(rounds):
        for n in tokens:
            by_fewer = max((seconds * n / max(fewer, _DECODED) for fewer, seconds in took.items()), default=0.0)
            if took.get(n, by_fewer) > budget.left_s / _SHARE:
                continue
            start = budget.clock()
            times.setdefault(n, []).append([model.pass_s(n) for model in models])
            took[n] = budget.clock() - start
    return times


class _TinyModel:
    """One of the models, loaded from a checkpoint that is written for it and deleted with it."""

    def __init__(self, device: Device, layers: int, top_k: int) -> None:
        self._device, self._layers, self._top_k = device, layers, top_k
        self.experts_per_event = {1: float(top_k)}
        """How many experts an event of a pass had on average, by tokens."""
        self._resources = ExitStack()

    def __enter__(self) -> _TinyModel:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="offload-profile-")))
            _write(folder, self._layers, self._top_k)
            link = self._device.link_bytes_per_s if isinstance(self._device, EmulatedDevice) else None
            model = OffloadedModel.from_pretrained(folder, device=self._device.name, link=link, threads=1)
            self._model = stack.enter_context(model)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    def pass_s(self, tokens: int) -> float:
        """Seconds of a pass: of a prompt's, or for one token of one in the middle of generating."""
        ids = torch.arange(max(tokens, 2), device=self._model.device).remainder(_VOCAB - 1)[None] + 1
        self._model.reset_stats()
        if tokens > 1:
            taken_s = seconds(lambda: self._model(ids).logits.sum().item())
            stats = self._model.stats
            self.experts_per_event[tokens] = stats.tiers[stats.computing].counts.accesses / self._layers
            return taken_s
        self._model.generate(ids, max_new_tokens=_DECODED, min_new_tokens=_DECODED, do_sample=False)
        speed = self._model.stats.speed[Phase.DECODE]
        return speed.seconds / speed.tokens


def _write(folder: Path, layers: int, top_k: int) -> None:
    config = Qwen3MoeConfig(
        hidden_size=_HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=_INTERMEDIATE,
        num_experts=_EXPERTS,
        num_experts_per_tok=top_k,
        vocab_size=_VOCAB,
        pad_token_id=0,
        dtype=torch.bfloat16,
    )
    model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
