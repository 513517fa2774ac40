"""Kernels of quantised experts: milliseconds for one expert's SwiGLU, beside plain calls of torch and bitsandbytes.

    python scripts/bench/cpu_kernels.py --out kernels.md

One pinned thread. Every contender has many experts, visited in turn, so that weights come from memory and not from a
cache. Contenders take turns, repetition by repetition, in the opposite order every other time. Times are the
processor's own, so that what else runs on the machine disturbs less; figures are medians. Then the time to pack one
expert as the CPU wants it, and to encode one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable
from copy import copy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from offload.formats import FORMATS, Fields, Format
from offload.formats.cpu.native import nested_library
from offload.formats.nf4 import bitsandbytes
from scripts.bench.common import Arguments, markdown, note, take_turns, timed

SHAPES = {"Qwen3-30B": (2048, 768), "OLMoE": (2048, 1024), "DeepSeek-V2-Lite": (2048, 1408)}  # hidden, intermediate
TOKENS = (1, 8, 32, 128)
# The plain calls that compute with the same format.
PLAIN = {
    "int8": ("torch int8",),
    "nf4": ("bitsandbytes packed", "bitsandbytes matmul_4bit"),
    "nested4": ("torch int4",),
}
BF16 = torch.bfloat16

Weights = tuple[torch.Tensor, torch.Tensor]  # gate and up together [2I, H], and down [H, I]
Expert = tuple[Fields, Fields]
Linear = Callable[[torch.Tensor, Fields, int, int], torch.Tensor]
Prepare = Callable[[torch.Tensor], Fields]


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Time every contender for every shape and number of tokens."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    for name in args.shapes:
        hidden, inner = SHAPES[name]
        weights = (torch.randn(2 * inner, hidden).mul_(0.02), torch.randn(hidden, inner).mul_(0.02))
        contenders = {
            label: (linear, copies((prepare(weights[0]), prepare(weights[1])), args.rotate_bytes))
            for label, (linear, prepare) in ways().items()
        }
        times = {tokens: compare(contenders, hidden, inner, tokens, args.repetitions) for tokens in TOKENS}
        del contenders
        result[name] = {"ms": times, "ratio": ratios(times), "per_expert_ms": conversions(weights, args.rotate_bytes)}
        note(f"{name}: {result[name]['ratio']}")
    if args.out:
        args.out.write_text(tables(result), encoding="utf-8")
    return {"native": nested_library() is not None, "shapes": result}


def ways() -> dict[str, tuple[Linear, Prepare]]:
    """Every contender: how it multiplies, and how it wants a matrix."""
    functional = bitsandbytes()
    functional_ops, aten = torch.ops.bitsandbytes, torch.ops.aten
    levels = functional.get_4bit_type("nf4", device="cpu")
    found: dict[str, tuple[Linear, Prepare]] = {
        "bf16 linear": (
            lambda x, w, n, k: torch.nn.functional.linear(x, w["weight"]),
            lambda weight: {"weight": weight.to(BF16)},
        ),
        "torch int8": (
            lambda x, w, n, k: aten._weight_int8pack_mm(x, w["codes"], w["scales"]),
            FORMATS["int8"].encode,
        ),
        "torch int4": (lambda x, w, n, k: aten._weight_int4pack_mm_for_cpu(x, w["codes"], 64, w["groups"]), int4),
        "bitsandbytes matmul_4bit": (  # what it calls without a gradient
            lambda x, w, n, k: functional_ops.gemm_4bit(x, w["codes"].view(-1, 1), (n, k), w["absmax"], 64, "nf4"),
            FORMATS["nf4"].encode,
        ),
    }
    if functional.has_avx512bf16():
        found["bitsandbytes packed"] = (
            lambda x, w, n, k: functional_ops.gemv_4bit(x, w["codes"], (n, k), w["absmax"], levels, 64),
            packed_by_bitsandbytes,
        )
    for form in FORMATS.values():
        found |= {level: (partial(ours, form, level), partial(resident, form, level)) for level in form.levels}
    return found


def int4(weight: torch.Tensor) -> Fields:
    """A matrix of that shape for torch's 4-bit kernel; its values do not matter."""
    codes = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    groups = torch.rand(weight.shape[1] // 64, weight.shape[0], 2).to(BF16)
    return {"codes": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), "groups": groups}


def packed_by_bitsandbytes(weight: torch.Tensor) -> Fields:
    """A matrix for bitsandbytes' kernel for CPUs."""
    functional = bitsandbytes()
    codes, state = functional._convert_weight_packed_for_cpu(*functional.quantize_4bit(weight, quant_type="nf4"))
    return {"codes": codes, "absmax": state.absmax}


def ours(form: Format, level: str, x: torch.Tensor, fields: Fields, n: int, k: int) -> torch.Tensor:
    """The product in `form` at `level`."""
    return form.linear(x, fields, n, k, level)


def resident(form: Format, level: str, weight: torch.Tensor) -> Fields:
    """A matrix in `form` at `level` as it lies in memory."""
    stored, out = form.encode(weight), empty(form, level, weight)
    if not out:
        return {field.name: stored[field.name] for field in form.stored(len(weight), weight.shape[1], level)}
    form.pack(stored, len(weight), weight.shape[1], level, out)
    return out


def empty(form: Format, level: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Room for a packed matrix; nothing where it is not packed."""
    fields = form.packed(len(weight), weight.shape[1], level, "cpu") or ()
    return {field.name: torch.empty(field.shape, dtype=field.dtype) for field in fields}


def copies(expert: Expert, total_bytes: int) -> list[Expert]:
    """As many copies as fill `total_bytes`."""
    nbytes = sum(tensor.nbytes for matrix in expert for tensor in matrix.values())
    return [
        tuple({name: tensor.clone() for name, tensor in matrix.items()} for matrix in expert)  # type: ignore[misc]
        for _ in range(max(2, total_bytes // nbytes))
    ]


def compare(
    contenders: dict[str, tuple[Linear, list[Expert]]], hidden: int, inner: int, tokens: int, repetitions: int
) -> dict[str, float]:
    """Median milliseconds of one expert on `tokens` tokens, by contender; they take turns."""
    x = torch.randn(tokens, hidden).to(BF16)

    def expert(linear: Linear, following: Iterable[Expert]) -> None:
        up, down = next(iter(following))
        both = linear(x, up, 2 * inner, hidden)
        linear(torch.nn.functional.silu(both[:, :inner]) * both[:, inner:], down, hidden, inner)

    calls = {
        label: timed(partial(expert, linear, itertools.cycle(experts)), time.thread_time)
        for label, (linear, experts) in contenders.items()
    }
    medians = {label: 1e3 * median(seconds) for label, seconds in take_turns(calls, repetitions).items()}
    note(f"{hidden} x {inner}, {tokens} tokens: " + ", ".join(f"{k} {v:.3f}" for k, v in medians.items()))
    return medians


def ratios(times: dict[int, dict[str, float]]) -> dict[str, dict[int, float]]:
    """Ours over the best plain call of the same format, by level and tokens."""
    return {
        level: {
            tokens: round(row[level] / min(row[label] for label in labels if label in row), 2)
            for tokens, row in times.items()
        }
        for level, labels in PLAIN.items()
    }


def conversions(weights: Weights, rotate_bytes: int) -> dict[str, dict[str, float]]:
    """Milliseconds to encode one expert, and to pack what was read of it, beside bitsandbytes' own packing."""
    result: dict[str, dict[str, float]] = {"pack": {}, "encode": {}}
    for form in FORMATS.values():
        result["encode"][form.name] = median_ms([partial(encode, form, weights)] * 5)
        experts = copies((form.encode(weights[0]), form.encode(weights[1])), rotate_bytes // 4)
        for level in form.levels:
            outs = [empty(form, level, weight) for weight in weights]
            if all(outs):
                result["pack"][level] = median_ms(partial(pack, form, level, e, outs, weights) for e in experts)
    functional = bitsandbytes()
    if functional.has_avx512bf16():
        quantised = [functional.quantize_4bit(weight, blocksize=64, quant_type="nf4") for weight in weights]
        result["pack"]["bitsandbytes"] = median_ms([partial(pack_theirs, quantised)] * 5)
    return result


def encode(form: Format, weights: Weights) -> None:
    """One expert."""
    for weight in weights:
        form.encode(weight)


def pack(form: Format, level: str, expert: Expert, outs: list[dict[str, torch.Tensor]], weights: Weights) -> None:
    """One expert, into `outs`."""
    for fields, out, weight in zip(expert, outs, weights, strict=True):
        form.pack(fields, len(weight), weight.shape[1], level, out)


def pack_theirs(quantised: list[tuple[torch.Tensor, Any]]) -> None:
    """One expert, by bitsandbytes, which changes the state it is given."""
    for codes, state in quantised:
        bitsandbytes()._convert_weight_packed_for_cpu(codes, copy(state))


def median_ms(calls: Iterable[Callable[[], object]]) -> float:
    """Median milliseconds of the processor, without the first call, which warms up."""
    return 1e3 * median([timed(call, time.thread_time)() for call in calls][1:])


def tables(result: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    shapes = list(result.values())

    def times(name: str, key: str) -> list[str]:
        return [" / ".join(f"{shape[key][tokens][name]:.2f}" for tokens in TOKENS) for shape in shapes]

    lines = [[label, *times(label, "ms")] for label in shapes[0]["ms"][TOKENS[0]]]
    for level in PLAIN:
        cells = [" / ".join(f"{shape['ratio'][level][tokens]:.2f}" for tokens in TOKENS) for shape in shapes]
        lines.append([f"{level} over the best plain call", *cells])
    conversions = [
        [f"{kind} {label}", *(f"{shape['per_expert_ms'][kind][label]:.2f}" for shape in shapes)]
        for kind in ("pack", "encode")
        for label in shapes[0]["per_expert_ms"][kind]
    ]
    return markdown(["", *result], lines) + "\n" + markdown(["ms per expert", *result], conversions)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, repetitions=40)
    arguments.names("--shapes", SHAPES, "of experts")
    arguments.option("--rotate-bytes", 400 << 20, "bytes of weights each contender cycles through")
    arguments.option("--out", None, "write the tables there, as Markdown", type=Path)
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
