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
from typing import Any, NamedTuple

import torch

from offload.formats import FORMATS, Fields, Format
from offload.formats.cpu.native import nested_library
from offload.formats.nf4 import bitsandbytes
from scripts.bench.common import note, run

SHAPES = {"Qwen3-30B": (2048, 768), "OLMoE": (2048, 1024), "DeepSeek-V2-Lite": (2048, 1408)}  # hidden, intermediate
TOKENS = (1, 8, 32, 128)
# The plain calls that compute with the same format.
PLAIN = {
    "int8": ("torch int8",),
    "nf4": ("bitsandbytes packed", "bitsandbytes matmul_4bit"),
    "nested4": ("torch int4",),
}
BF16 = torch.bfloat16

Expert = tuple[Fields, Fields]  # gate and up together [2I, H], and down [H, I]
Linear = Callable[[torch.Tensor, Fields, int, int], torch.Tensor]
Prepare = Callable[[torch.Tensor], Fields]


class Contender(NamedTuple):
    """A way to multiply, and experts as it wants them."""

    linear: Linear
    experts: list[Expert]


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
            label: Contender(linear, copies((prepare(weights[0]), prepare(weights[1])), args.rotate_bytes))
            for label, (linear, prepare) in ways().items()
        }
        times = {tokens: take_turns(contenders, hidden, inner, tokens, args.repetitions) for tokens in TOKENS}
        del contenders
        result[name] = {"ms": times, "ratio": ratios(times), "per_expert_ms": conversions(weights, args.rotate_bytes)}
        note(f"{name}: {result[name]['ratio']}")
    if args.out:
        args.out.write_text(table(result), encoding="utf-8")
    return {
        "benchmark": "kernels",
        "repetitions": args.repetitions,
        "rotate_bytes": args.rotate_bytes,
        "native": nested_library() is not None,
        "shapes": result,
    }


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
        for level in form.levels:
            found[level] = (partial(ours, form, level), partial(resident, form, level))
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
    n, k = weight.shape
    stored = form.encode(weight)
    packed = form.packed(n, k, level, "cpu")
    if packed is None:
        return {field.name: stored[field.name] for field in form.stored(n, k, level)}
    out = {field.name: torch.empty(field.shape, dtype=field.dtype) for field in packed}
    form.pack(stored, n, k, level, out)
    return out


def copies(expert: Expert, total_bytes: int) -> list[Expert]:
    """As many copies as fill `total_bytes`."""
    nbytes = sum(tensor.nbytes for matrix in expert for tensor in matrix.values())
    return [(clone(expert[0]), clone(expert[1])) for _ in range(max(2, total_bytes // nbytes))]


def clone(fields: Fields) -> Fields:
    """The same elsewhere."""
    return {name: tensor.clone() for name, tensor in fields.items()}


def take_turns(
    contenders: dict[str, Contender], hidden: int, inner: int, tokens: int, repetitions: int
) -> dict[str, float]:
    """Median milliseconds of one expert on `tokens` tokens, by contender."""
    x = torch.randn(tokens, hidden).to(BF16)
    times: dict[str, list[float]] = {label: [] for label in contenders}
    following = {label: itertools.cycle(contender.experts) for label, contender in contenders.items()}

    def expert(label: str) -> None:
        linear = contenders[label].linear
        up, down = next(following[label])
        both = linear(x, up, 2 * inner, hidden)
        linear(torch.nn.functional.silu(both[:, :inner]) * both[:, inner:], down, hidden, inner)

    for label in contenders:
        expert(label)
        expert(label)
    for repetition in range(repetitions):
        for label in contenders if repetition % 2 == 0 else reversed(contenders):
            began = time.thread_time()
            expert(label)
            times[label].append(1e3 * (time.thread_time() - began))
    medians = {label: median(values) for label, values in times.items()}
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


def conversions(weights: tuple[torch.Tensor, torch.Tensor], rotate_bytes: int) -> dict[str, dict[str, float]]:
    """Milliseconds to encode one expert, and to pack what was read of it, beside bitsandbytes' own packing."""
    result: dict[str, dict[str, float]] = {"pack": {}, "encode": {}}
    for form in FORMATS.values():
        result["encode"][form.name] = timed(partial(encode, form, weights) for _ in range(5))
        experts = copies((form.encode(weights[0]), form.encode(weights[1])), rotate_bytes // 4)
        for level in form.levels:
            described = [form.packed(len(weight), weight.shape[1], level, "cpu") for weight in weights]
            outs = [{f.name: torch.empty(f.shape, dtype=f.dtype) for f in fields or ()} for fields in described]
            if all(outs):
                result["pack"][level] = timed(partial(pack, form, level, e, outs, weights) for e in experts)
    functional = bitsandbytes()
    if functional.has_avx512bf16():
        quantised = [functional.quantize_4bit(weight, blocksize=64, quant_type="nf4") for weight in weights]
        states = [(codes, copy(state)) for _ in range(5) for codes, state in quantised]
        convert = functional._convert_weight_packed_for_cpu
        result["pack"]["bitsandbytes"] = timed(
            lambda pair=pair: [convert(*matrix) for matrix in pair]  # type: ignore[misc]
            for pair in zip(states[::2], states[1::2], strict=True)
        )
    return result


def encode(form: Format, weights: Iterable[torch.Tensor]) -> None:
    """One expert."""
    for weight in weights:
        form.encode(weight)


def pack(
    form: Format, level: str, expert: Expert, outs: list[dict[str, torch.Tensor]], weights: Iterable[torch.Tensor]
) -> None:
    """One expert, into `outs`."""
    for fields, out, weight in zip(expert, outs, weights, strict=True):
        form.pack(fields, len(weight), weight.shape[1], level, out)


def timed(calls: Iterable[Callable[[], object]]) -> float:
    """Median milliseconds of the processor, without the first call, which warms up."""
    times = []
    for call in calls:
        began = time.thread_time()
        call()
        times.append(1e3 * (time.thread_time() - began))
    return median(times[1:])


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines = ["| | " + " | ".join(result) + " |", "|---" * (len(result) + 1) + "|"]
    first = next(iter(result.values()))
    for label in first["ms"][TOKENS[0]]:
        cells = [" / ".join(f"{shape['ms'][tokens][label]:.2f}" for tokens in TOKENS) for shape in result.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for level in first["ratio"]:
        cells = [" / ".join(f"{shape['ratio'][level][tokens]:.2f}" for tokens in TOKENS) for shape in result.values()]
        lines.append(f"| {level} over the best plain call | " + " | ".join(cells) + " |")
    lines += ["", "| ms per expert | " + " | ".join(result) + " |", "|---" * (len(result) + 1) + "|"]
    for kind in ("pack", "encode"):
        for label in first["per_expert_ms"][kind]:
            cells = [f"{shape['per_expert_ms'][kind][label]:.2f}" for shape in result.values()]
            lines.append(f"| {kind} {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--shapes",
        type=lambda text: text.split(","),
        default=list(SHAPES),
        help=f"names, with commas between (default {','.join(SHAPES)})",
    )
    parser.add_argument("--repetitions", type=int, default=40, help="default 40")
    parser.add_argument(
        "--rotate-bytes", type=int, default=400 << 20, help="bytes of weights each contender cycles through"
    )
    parser.add_argument("--out", type=Path, help="write the tables there, as Markdown")
    args = parser.parse_args(argv)
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
