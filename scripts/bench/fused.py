"""All experts of a layer in two launches, on a CUDA GPU: beside one by one, and beside what its memory allows.

    python scripts/bench/fused.py --out fused.md

A layer's experts lie in slots, as many layers of them as are larger than the GPU's cache, visited in turn. Each way
routes the same tokens to the same experts. Times are the GPU's, from events around many calls. The limit is the bytes
of the experts used, each once, at the rate at which this GPU copies memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from offload.engine.fused.layer import FusedLayer, Kernels
from offload.engine.fused.places import Activation, ExpertPlaces
from offload.engine.outputs import compute_expert
from offload.formats.precision import form_of
from offload.machine.compute import ExpertModule
from offload.store.base import Weights
from offload.store.record import RecordLayout
from scripts.bench.common import Args, Arguments, BenchmarkError, Result, markdown, note, take_turns

# hidden, intermediate, experts, of whom each token uses; and whether as gpt-oss stores them
SHAPES = {
    "Qwen3-30B": (2048, 768, 128, 8, False),
    "OLMoE": (2048, 1024, 64, 8, False),
    "gpt-oss-20b": (2880, 2880, 32, 4, True),
}
FORMATS = ("bf16", "int8", "nf4", "nested8", "nested4", "nested2")
TOKENS = (1, 2, 4, 8, 16, 32)
WAYS = ("two launches", "one by one")
CACHE_BYTES = 256 << 20  # more than any GPU's second-level cache
BF16 = torch.bfloat16

Groups = dict[int, tuple[torch.Tensor, torch.Tensor]]  # by expert: the tokens that use it, and as which of their k


@dataclass(frozen=True)
class Layer:
    """Experts of one layer in slots, as the runtime has them: records of a store."""

    module: Any
    """What the runtime asks of an experts module."""
    places: ExpertPlaces
    weights: Callable[[torch.Tensor], Weights]
    """An expert's parameters over its slot."""
    slots: torch.Tensor
    """[experts, bytes]."""

    @cached_property
    def experts(self) -> list[Weights]:
        """The parameters of each."""
        return [self.weights(slot) for slot in self.slots]

    def one_by_one(self, x: torch.Tensor, groups: Groups, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], who uses which expert, weights [T, K] -> [T, H]: a product for each expert and matrix."""
        out = torch.zeros_like(x)
        for expert, (token, k) in groups.items():
            y = compute_expert(self.module, x[token], self.experts[expert])
            out.index_add_(0, token, y * weights[token, k, None].to(x.dtype))
        return out


def benchmark(args: Args) -> Result:
    """Time both ways for every shape, format and number of tokens. Raises BenchmarkError without a GPU or Triton."""
    if not torch.cuda.is_available():
        raise BenchmarkError("this machine has no CUDA GPU: nothing to measure")
    try:
        from offload.engine.fused import kernels
    except ImportError as error:
        raise BenchmarkError("Triton is not installed: pip install triton") from error
    torch.manual_seed(0)
    bytes_per_s = memory_bytes_per_s()
    note(f"memory: {bytes_per_s / 1e9:.0f} GB/s")
    rows: list[Result] = []
    for shape, form in itertools.product(args.shapes, args.formats):
        hidden, inner, count, top_k, as_gpt_oss = SHAPES[shape]
        layers = [make_layer(hidden, inner, count, as_gpt_oss, form, "cuda")]
        while sum(layer.slots.nbytes for layer in layers) < CACHE_BYTES:
            layers.append(replace(layers[0], slots=layers[0].slots.clone()))
        for tokens in TOKENS:
            chosen = torch.stack([torch.randperm(count, device="cuda")[:top_k] for _ in range(tokens)])
            ms = compare(layers, kernels, chosen, args.repetitions)
            limit_ms = 1e3 * len(chosen.unique()) * layers[0].places.slot_bytes / bytes_per_s
            rows.append({"shape": shape, "format": form, "tokens": tokens, **ms, "limit": limit_ms})
            note(str(rows[-1]))
    if args.out:
        args.out.write_text(table(rows), encoding="utf-8")
    return {"gpu": torch.cuda.get_device_name(), "memory_bytes_per_s": bytes_per_s, "ms": rows}


def make_layer(hidden: int, inner: int, count: int, as_gpt_oss: bool, form: str, device: str) -> Layer:
    """Experts of this shape, all with the same random weights."""
    module: Any = ExpertModule()
    parameters = {"gate_up_proj": torch.randn(2 * inner, hidden) * 0.02, "down_proj": torch.randn(hidden, inner) * 0.02}
    if as_gpt_oss:
        biases = {f"{name}_bias": torch.randn(len(weight)) * 0.02 for name, weight in parameters.items()}
        parameters = {name: weight.t() for name, weight in parameters.items()} | biases
        module.has_bias = module.is_transposed = True
        module.alpha, module.limit = 1.702, 7.0
        module._apply_gate = Activation(interleaved=True, alpha=module.alpha, limit=module.limit)
    described = [SimpleNamespace(name=name, dtype=BF16, shape=tuple(each.shape)) for name, each in parameters.items()]
    model = SimpleNamespace(get_submodule=lambda path: module)
    layer: Any = SimpleNamespace(model=model, path="experts", parameters=described, is_transposed=module.is_transposed)
    layout = RecordLayout.of(layer, form_of(form))
    record, segments = torch.empty(layout.record_bytes, dtype=torch.uint8), layout.segments_of(form)
    layout.write(parameters, record)

    def weights(slot: torch.Tensor) -> Weights:
        return layout.weights(layout.views(slot, 0, segments), form)

    slot = record[: sum(layout.segment_bytes[:segments])]
    places = ExpertPlaces.of(module, len(slot), weights)
    assert places is not None, "kernels read all of these"
    return Layer(module, places, weights, slot.to(device).repeat(count, 1))


def groups_of(chosen: torch.Tensor) -> Groups:
    """Experts [T, K] by expert; made before anything is timed, since it waits for the GPU."""
    return {int(expert): torch.nonzero(chosen == expert, as_tuple=True) for expert in chosen.unique()}  # type: ignore[misc]


def compare(layers: list[Layer], kernels: Kernels, chosen: torch.Tensor, repetitions: int) -> dict[str, float]:
    """Median milliseconds of a layer, by way; they take turns."""
    x = torch.randn(len(chosen), layers[0].places.gate_up.k, device=chosen.device).to(BF16)
    weights, slots = torch.rand(chosen.shape, device=chosen.device), chosen.int()
    following, groups = itertools.cycle(layers), groups_of(chosen)

    def together() -> None:
        layer = next(following)
        FusedLayer(kernels, layer.places, x, weights).all(slots, layer.slots.view(-1))

    def one_by_one() -> None:
        next(following).one_by_one(x, groups, weights)

    ways = {name: partial(gpu_ms, way) for name, way in zip(WAYS, (together, one_by_one), strict=True)}
    return {name: median(ms) for name, ms in take_turns(ways, repetitions).items()}


def gpu_ms(action: Callable[[], object], calls: int = 8) -> float:
    """Milliseconds of one of several calls, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        action()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def memory_bytes_per_s(nbytes: int = 1 << 30) -> float:
    """How fast this GPU reads memory and writes it again, both counted."""
    source, destination = (torch.zeros(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    destination.copy_(source)
    return 2e3 * nbytes / median(gpu_ms(partial(destination.copy_, source)) for _ in range(5))


def table(rows: list[Result]) -> str:
    """The figures as a Markdown table: microseconds at each number of tokens."""
    groups = [list(own) for _, own in itertools.groupby(rows, lambda row: (row["shape"], row["format"]))]
    columns = (*WAYS, "limit")
    lines = ([" / ".join(f"{1e3 * row[way]:.0f}" for row in own) for way in columns] for own in groups)
    names = (f"{own[0]['shape']}, {own[0]['format']}" for own in groups)
    head = f"µs at {' / '.join(map(str, TOKENS))} tokens"
    return markdown([head, *columns], ([name, *line] for name, line in zip(names, lines, strict=True)))


if __name__ == "__main__":
    arguments = Arguments(__doc__, repetitions=20)
    arguments.option("--shapes", list(SHAPES), "of experts", choices=SHAPES)
    arguments.option("--formats", FORMATS, "of their weights", choices=FORMATS)
    arguments.option("--out", None, "write the table there, as Markdown", type=Path)
    raise SystemExit(arguments.run(benchmark))
