"""All experts of a layer in two launches, on a CUDA GPU: beside one by one, and beside what its memory allows.

    python scripts/bench/fused.py --out fused.md

A layer's experts lie in slots, as many layers of them as are larger than the GPU's cache, visited in turn. Each way
routes the same tokens to the same experts. Times are the GPU's, from events around many calls; figures are medians.
The limit is the bytes of the experts used, each once, at the rate at which this GPU copies memory. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from offload.checkpoint.parameter import align
from offload.engine.fused.layer import FusedLayer, Kernels
from offload.engine.fused.places import FIELDS, Activation, ExpertPlaces, MatrixPlace
from offload.formats import Format
from offload.formats.precision import form_of
from scripts.bench.common import Arguments, BenchmarkError, markdown, note, take_turns

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
    """Experts of one layer in slots, and their parameters as they are computed one by one."""

    places: ExpertPlaces
    block: torch.Tensor
    count: int

    def one_by_one(self, x: torch.Tensor, groups: Groups, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], who uses which expert, weights [T, K] -> [T, H]: a product for each expert and matrix."""
        out = torch.zeros_like(x)
        for expert, (token, k) in groups.items():
            slot = self.block.view(self.count, -1)[expert]
            inner = self.places.activation(_linear(x[token], self.places.gate_up, slot))
            out.index_add_(0, token, _linear(inner, self.places.down, slot) * weights[token, k, None].to(x.dtype))
        return out


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
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
    rows: list[dict[str, Any]] = []
    for shape, form in itertools.product(args.shapes, args.formats):
        hidden, inner, count, top_k, as_gpt_oss = SHAPES[shape]
        layers = [make_layer(hidden, inner, count, as_gpt_oss, form, "cuda")]
        while sum(layer.block.nbytes for layer in layers) < CACHE_BYTES:
            layers.append(Layer(layers[0].places, layers[0].block.clone(), layers[0].count))
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
    gate_up, at = _place(2 * inner, hidden, form, 0, as_gpt_oss)
    down, at = _place(hidden, inner, form, at, as_gpt_oss)
    activation = Activation(interleaved=True, alpha=1.702, limit=7.0) if as_gpt_oss else Activation(interleaved=False)
    first = torch.zeros(at, dtype=torch.uint8)
    for matrix in (gate_up, down):
        views, weight, form_or_dtype = matrix.views(first), torch.randn(matrix.n, matrix.k) * 0.02, form_of(form)
        if isinstance(form_or_dtype, Format):
            fields = form_or_dtype.encode(weight)
        else:
            fields = {"weight": weight.t() if as_gpt_oss else weight}
        for name, field in (fields | {"bias": torch.randn(matrix.n) * 0.02}).items():
            if name in views:
                views[name].copy_(field)
    return Layer(ExpertPlaces(at, gate_up, down, activation), first.to(device).repeat(count), count)


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
        FusedLayer(kernels, layer.places, x, weights).all(slots, layer.block)

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


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table: microseconds at each number of tokens."""
    groups = [list(own) for _, own in itertools.groupby(rows, lambda row: (row["shape"], row["format"]))]
    columns = (*WAYS, "limit")
    lines = ([" / ".join(f"{1e3 * row[way]:.0f}" for row in own) for way in columns] for own in groups)
    names = (f"{own[0]['shape']}, {own[0]['format']}" for own in groups)
    head = f"µs at {' / '.join(map(str, TOKENS))} tokens"
    return markdown([head, *columns], ([name, *line] for name, line in zip(names, lines, strict=True)))


def _place(n: int, k: int, form: str, at: int, as_gpt_oss: bool) -> tuple[MatrixPlace, int]:
    """A matrix at byte `at` of a slot, and where the next may begin."""
    form_or_dtype = form_of(form)
    if isinstance(form_or_dtype, Format):
        stored = {field.name: field.nbytes for field in form_or_dtype.stored(n, k, form)}
        kind, sizes = form, [stored[name] for name in FIELDS[form]]
    else:
        kind, sizes = "transposed" if as_gpt_oss else "plain", [n * k * 2]
    *fields, at = itertools.accumulate(sizes, lambda begin, nbytes: align(begin + nbytes), initial=at)
    bias = at if as_gpt_oss else None
    return MatrixPlace(kind, n, k, BF16, tuple(fields), bias), align(at + n * 2) if as_gpt_oss else at


def _linear(x: torch.Tensor, matrix: MatrixPlace, slot: torch.Tensor) -> torch.Tensor:
    """As experts are computed one by one: torch's product, or the format's own kernel."""
    views = matrix.views(slot)
    bias = views.pop("bias", None)
    if "weight" in views:
        y = torch.mm(x, views["weight"] if matrix.kind == "transposed" else views["weight"].t())
    else:
        form = form_of(matrix.kind)
        assert isinstance(form, Format)
        y = form.linear(x, views, matrix.n, matrix.k, matrix.kind)
    return y if bias is None else y.add_(bias)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, repetitions=20)
    arguments.names("--shapes", SHAPES, "of experts")
    arguments.names("--formats", FORMATS, "of their weights")
    arguments.option("--out", None, "write the table there, as Markdown", type=Path)
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
