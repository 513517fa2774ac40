"""The engines that benchmarks compare, each loaded in a worker process and driven one token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.moe import ExpertsInterface

from offload import OffloadedModel
from scripts.bench.serve import Answer, Request

DTYPE = torch.bfloat16


@dataclass
class Engine:
    """A loaded model: transformers' own `forward`, and the runtime's `stats` and `reset` if it has any.

    `model` is what a TraceRouter can route, where there is more than `forward`.
    """

    forward: Callable[..., Any]
    config: Any
    model: Any = None
    chunk: int | None = None  # tokens that one pass may have; None: any number
    stats: Callable[[], dict[str, Any]] = field(default=dict)
    reset: Callable[[], None] = field(default=lambda: None)
    close: Callable[[], None] = field(default=lambda: None)


def load_offload(checkpoint: Path, threads: int, cpu_mem: int | None, context: int, **options: Any) -> Engine:
    """This project, on the CPU, within `cpu_mem` bytes; `options` are from_pretrained's other ones."""
    model = OffloadedModel.from_pretrained(
        checkpoint, cpu_mem=cpu_mem, context=context, device="cpu", threads=threads, **options
    )
    return engine_of(model)


def engine_of(model: OffloadedModel) -> Engine:
    """This project's model as an engine."""
    return Engine(
        forward=model.forward,
        config=model.config,
        model=model,
        chunk=model.plan.chunk,
        stats=lambda: model.stats.as_dict(),
        reset=model.reset_stats,
        close=model.close,
    )


def load_transformers(checkpoint: Path, threads: int) -> Engine:
    """Plain transformers with everything in memory and its fastest exact experts function."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=DTYPE, experts_implementation="grouped_mm")
    return Engine(model, model.config, model)


def load_accelerate(checkpoint: Path, threads: int, offload_folder: Path, cpu_layers: int = 0) -> Engine:
    """transformers with accelerate's disk offload: the experts on disk, everything else in memory.

    accelerate maps its files and loads nothing by itself, so that only the experts in use are read, and the
    page cache keeps them. Families stored expert by expert are first rewritten to `offload_folder` in the
    fused layout. The first `cpu_layers` layers' experts stay in memory.
    """
    torch.set_num_threads(threads)
    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    experts = [name for name, module in skeleton.named_modules() if _is_fused(module)]
    on_disk = set(experts[cpu_layers:])
    device_map = {
        name: "disk" if name in on_disk else "cpu"
        for name, module in skeleton.named_modules()
        if name in on_disk or _is_leaf_outside(module, name, on_disk)
    }
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=DTYPE, device_map=device_map, offload_folder=str(offload_folder)
    )
    return Engine(model, model.config, model)


def load_dense_part(checkpoint: Path, threads: int) -> Engine:
    """The same model without its experts, which answer zeros: what a token costs when experts are free.

    Its weights are random: they are the right bytes in the right shapes, which is all that time depends on.
    """
    torch.set_num_threads(threads)
    ExpertsInterface.register("zeros", _zeros)
    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, experts_implementation="zeros")
    for module in model.modules():
        if _is_fused(module):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = torch.empty(parameter.shape, dtype=DTYPE).normal_(std=0.02)
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    rotary = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    model.model.rotary_emb = rotary
    return Engine(model.eval().forward, config)


def _zeros(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return torch.zeros_like(hidden_states)


def _is_fused(module: nn.Module) -> bool:
    """Is this the module that holds all experts of a layer as 3-D parameters?"""
    down = dict(module.named_parameters(recurse=False)).get("down_proj")
    return down is not None and down.dim() == 3


def _is_leaf_outside(module: nn.Module, name: str, on_disk: set[str]) -> bool:
    """Does this module hold parameters or buffers itself, outside the modules on disk?"""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return bool(own) and not any(name == other or name.startswith(other + ".") for other in on_disk)


def steps(engine: Engine, ids: list[int]) -> Iterator[tuple[float, int]]:
    """Feed `ids` one a step with a fresh KV cache: (seconds, the token it would choose) of each step."""
    cache = DynamicCache(config=engine.config)
    for token in ids:
        with torch.inference_mode():
            began = time.perf_counter()
            output = engine.forward(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            chosen = int(output.logits[0, -1].argmax())
            yield time.perf_counter() - began, chosen


def decode(engine: Engine, ids: list[int], at_most_s: float | None = None) -> Answer:
    """What `steps` gives, as two lists; they end with the step that is over after `at_most_s`."""
    seconds: list[float] = []
    chosen: list[int] = []
    for step_s, token in steps(engine, ids):
        seconds.append(step_s)
        chosen.append(token)
        if at_most_s is not None and sum(seconds) > at_most_s:
            break
    return {"seconds": seconds, "chosen": chosen}


def prefill(engine: Engine, ids: list[int]) -> Answer:
    """Feed all `ids` in as few passes as the engine allows: the seconds they took together."""
    cache = DynamicCache(config=engine.config)
    with torch.inference_mode():
        began = time.perf_counter()
        for chunk in torch.tensor([ids]).split(engine.chunk or len(ids), dim=1):
            engine.forward(input_ids=chunk, past_key_values=cache, use_cache=True)
        return {"seconds": [time.perf_counter() - began], "chosen": []}


def handler(engine: Engine) -> Callable[[Request], Answer]:
    """Answers requests {"ids": [...], "prefill": bool, "at_most_s": s} with times and that run's own statistics."""

    def handle(request: Request) -> Answer:
        engine.reset()
        ids = request["ids"]
        answer = prefill(engine, ids) if request.get("prefill") else decode(engine, ids, request.get("at_most_s"))
        return answer | {"stats": engine.stats()}

    return handle
