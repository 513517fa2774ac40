"""The engines that benchmarks compare, driven by token ids: ours, plain transformers, and accelerate's disk offload.

Run as a program, with what `load` takes as JSON, it is one of them in a process of its own. Of this project only the
public `OffloadedModel` is used, so that it can drive other checkouts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.moe import ExpertsInterface

from offload import OffloadedModel
from scripts.bench.serve import Answer, Handler, Request, explaining, serve

DTYPE = torch.bfloat16
ENGINES = ("offload", "transformers", "accelerate", "dense")


class Engine:
    """A loaded model. Ours has statistics and a largest number of tokens a pass; `facts` is what loading took."""

    def __init__(self, model: Any, facts: Mapping[str, Any] | None = None) -> None:
        self.model = model
        self.ours = model if isinstance(model, OffloadedModel) else None
        self.facts = dict(facts or {})
        self.device = model.device if self.ours else torch.device("cpu")

    def stats(self) -> dict[str, Any]:
        """What ours counts, with the bytes of weights that a token is computed from, resident or not."""
        if self.ours is None:
            return {}
        plan: Any = self.ours.plan
        layer = plan.work.dense_layer_bytes + plan.work.top_k * plan.slot_bytes
        touched = int(plan.layers * layer + plan.work.dense_pass_bytes)
        return self.ours.stats.as_dict() | {"touched_bytes_per_token": touched}

    def reset(self) -> None:
        """Count from zero."""
        if self.ours is not None:
            self.ours.reset_stats()

    def close(self) -> None:
        """Give everything back."""
        if self.ours is not None:
            self.ours.close()


def load(engine: str, checkpoint: Path | str, *, threads: int | None = None, **options: Any) -> Engine:
    """One of ENGINES; `options` are `from_pretrained`'s for ours, and `load_accelerate`'s for accelerate."""
    checkpoint = Path(checkpoint)
    if threads is not None and engine != "offload":
        torch.set_num_threads(threads)
    _ = MODEL_FOR_CAUSAL_LM_MAPPING[
        type(AutoConfig.from_pretrained(checkpoint))
    ]  # imports its code, which is not timed
    before, began = _bytes_read(), time.perf_counter()
    model: Any
    if engine == "offload":
        model = OffloadedModel.from_pretrained(checkpoint, threads=threads, **options)
    elif engine == "accelerate":
        model = load_accelerate(checkpoint, **options)
    elif engine == "dense":
        model = load_dense_part(checkpoint)
    else:  # everything in memory, and the fastest exact experts function
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=DTYPE, experts_implementation="grouped_mm")
    facts = {
        "load_s": time.perf_counter() - began,
        "read_bytes": _bytes_read() - before,
        "rss_bytes": psutil.Process().memory_info().rss,
    }
    return Engine(model, facts | ({"plan": model.plan.as_dict()} if engine == "offload" else {}))


def load_accelerate(checkpoint: Path, folder: Path, cpu_layers: int = 0) -> Any:
    """transformers with accelerate's disk offload: the experts on disk, everything else in memory.

    accelerate maps its files and loads nothing by itself, so that only the experts in use are read, and the
    page cache keeps them. Families stored expert by expert are first rewritten to `folder` in the fused
    layout. The first `cpu_layers` layers' experts stay in memory.
    """
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
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=DTYPE, device_map=device_map, offload_folder=str(folder)
    )


def load_dense_part(checkpoint: Path) -> Any:
    """The same model without its experts, which answer zeros: what a token costs when experts are free.

    Its weights are random: they are the right bytes in the right shapes, which is all that time depends on.
    """
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
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    return model.eval()


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


def _bytes_read() -> int:
    """What this process has asked the kernel to read, from the page cache or not."""
    return int(psutil.Process().io_counters().read_chars)


def decode(
    engine: Engine,
    ids: list[int],
    *,
    warm_up: int = 0,
    at_most_s: float = float("inf"),
    before: Mapping[int, Callable[[], None]] | None = None,
) -> Answer:
    """Feed `ids` one a step with a fresh KV cache: seconds of each step, their mean, and the tokens it would choose.

    The first `warm_up` steps are not counted, nor in the statistics. It ends with the step that is over after
    `at_most_s`. `before` is what to call before the step of that number.
    """
    cache = DynamicCache(config=engine.model.config)
    seconds: list[float] = []
    chosen: list[int] = []
    for number, token in enumerate(ids):
        if before and number in before:
            before[number]()
        if number == warm_up:
            engine.reset()
        began = time.perf_counter()
        output = _forward(engine, torch.tensor([[token]]), cache)
        choice, taken = int(output.logits[0, -1].argmax()), time.perf_counter() - began
        if number >= warm_up:
            seconds.append(taken)
            chosen.append(choice)
        if sum(seconds) > at_most_s:
            break
    return {"s_per_token": mean(seconds), "seconds": seconds, "chosen": chosen, "stats": engine.stats()}


def prefill(engine: Engine, ids: list[int], chunk: int | None = None) -> Answer:
    """Feed all `ids` in as few passes as the engine and `chunk` allow: the seconds they took together.

    "first" are the statistics after the first pass.
    """
    cache = DynamicCache(config=engine.model.config)
    largest = min(each for each in (chunk, engine.ours and engine.ours.plan.chunk, len(ids)) if each)
    engine.reset()
    first: dict[str, Any] | None = None
    began = time.perf_counter()
    for part in torch.tensor([ids]).split(largest, dim=1):
        output = _forward(engine, part, cache, logits_to_keep=1)
        first = first or engine.stats()
    output.logits.cpu()
    return {"seconds": [time.perf_counter() - began], "chosen": [], "stats": engine.stats(), "first": first}


def _forward(engine: Engine, ids: Tensor, cache: DynamicCache, **options: Any) -> Any:
    with torch.inference_mode():
        return engine.model(input_ids=ids.to(engine.device), past_key_values=cache, use_cache=True, **options)


def generate(engine: Engine, ids: list[int], tokens: int) -> Answer:
    """A greedy reply of so many tokens to the prompt `ids`."""
    began = time.perf_counter()
    prompt = torch.tensor([ids], device=engine.device)
    output = engine.model.generate(prompt, max_new_tokens=tokens, do_sample=False)
    seconds, chosen = time.perf_counter() - began, output[0, len(ids) :].tolist()
    return {"seconds": [seconds], "chosen": chosen, "stats": engine.stats()}


@contextmanager
def routed(engine: Engine, trace: str, first_sequence: int = 0) -> Iterator[None]:
    """The model's layers follow the first ones of a recorded trace while the block runs."""
    from offload.traces.router import TraceRouter

    recorded = _trace(trace)
    count = engine.ours.plan.layers if engine.ours else engine.model.config.num_hidden_layers
    first_sequence %= len(recorded.sequence_offsets) - 1
    with TraceRouter(engine.model, recorded, layers=range(count), first_sequence=first_sequence):
        yield


@cache
def _trace(path: str) -> Any:
    from cache.traces.trace import Trace

    return Trace.open(path)


def handler(engine: Engine) -> Handler:
    """Answers requests: without ids with the facts of loading, else with what reading them took.

    "prefill" (with "chunk") and "generate" say how they are read, "warm_up" and "at_most_s" are those of `decode`.
    "trace" and "first_sequence" route them, and "record" records a trace. Before that, "predictor", "use_prefill" and
    "link", an emulated device's, change ours.
    """

    def handle(request: Request) -> Answer:
        ours: Any = engine.ours
        if "predictor" in request:
            ours.use_predictor(**request["predictor"])
        if "use_prefill" in request:
            ours.use_prefill(request["use_prefill"])
        if "link" in request:
            ours.parts.device.link_bytes_per_s = request["link"]
        if "ids" not in request:
            return engine.facts
        with ExitStack() as around:
            if request.get("trace"):
                around.enter_context(routed(engine, request["trace"], request.get("first_sequence", 0)))
            if "record" in request:
                around.enter_context(ours.record_trace(request["record"], predicted=3))
            if request.get("prefill"):
                return prefill(engine, request["ids"], request.get("chunk"))
            if "generate" in request:
                return generate(engine, request["ids"], request["generate"])
            options = {name: request[name] for name in ("warm_up", "at_most_s") if name in request}
            return decode(engine, request["ids"], **options)

    return handle


def main() -> int:
    """The program: one engine, until its requests end."""
    return serve(lambda: explaining(lambda: handler(load(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    sys.exit(main())
