"""Kernels of experts: milliseconds for one expert's SwiGLU, beside plain calls of torch and bitsandbytes.

    python scripts/bench/cpu_kernels.py --out kernels.md
    OFFLOAD_CPU=avx2 python scripts/bench/cpu_kernels.py --out kernels-avx2.md

One pinned thread. Every contender has many experts, visited in turn, so that weights come from memory and not from a
cache. Times are the processor's own, so that what else runs on the machine disturbs less. Then the time to encode one
expert, and to pack it as the CPU wants it: by the clock, as a machine's profile has it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear, silu

from offload.device.choose import make_device
from offload.formats import FORMATS, Fields, Format
from offload.formats.cpu.which import cpu
from offload.formats.nf4 import bitsandbytes
from offload.layers.products import Products
from offload.machine.compute import ComputeProbe, weight_block
from scripts.bench.common import Args, Arguments, Result, markdown, note, size, take_turns, timed

SHAPES = {"Qwen3-30B": (2048, 768), "OLMoE": (2048, 1024), "DeepSeek-V2-Lite": (2048, 1408)}  # hidden, intermediate
TOKENS = (1, 4, 8, 32, 128, 512)
LEVELS = {level: form for form in FORMATS.values() for level in form.levels}
# The plain calls that compute with the same format.
PLAIN = {
    "bf16": ("torch bf16", "torch fp32"),
    "int8": ("torch int8",),
    "nf4": ("bitsandbytes packed", "bitsandbytes matmul_4bit"),
    "nested4": ("torch int4",),
}
BF16 = torch.bfloat16
ROUNDED = "nf4, int8 inputs"

Weights = tuple[torch.Tensor, torch.Tensor]  # gate and up together [2I, H], and down [H, I]
Compute = Callable[[int], object]  # one expert for so many tokens, another one each time
Linear = Callable[[torch.Tensor, Fields, int, int], torch.Tensor]
Prepare = Callable[[torch.Tensor], Fields]


def benchmark(args: Args) -> Result:
    """Time every contender for every shape and number of tokens."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {}
    for name in args.shapes:
        hidden, inner = SHAPES[name]
        weights = (torch.randn(2 * inner, hidden).mul_(0.02), torch.randn(hidden, inner).mul_(0.02))
        contenders = {label: plain(*way, weights, args.rotate_bytes) for label, way in plain_ways().items()}
        for level in ("bf16", *LEVELS):
            contenders[level] = probe(args.rotate_bytes).expert_call(level, (hidden, inner))
        contenders[ROUNDED] = probe(args.rotate_bytes, int8_inputs=True).expert_call("nf4", (hidden, inner))
        times = {tokens: compare(contenders, tokens, args.repetitions) for tokens in TOKENS}
        del contenders
        encoded = {form.name: median_ms(partial(encode, form, weights)) for form in FORMATS.values()}
        per_expert = {"pack": packing(weights, args.rotate_bytes // 4), "encode": encoded}
        result[name] = {
            "ms": times,
            "gflops": gflops(times, hidden, inner),
            "ratio": ratios(times),
            "per_expert_ms": per_expert,
        }
        note(f"{name}: {result[name]['ratio']}")
    if args.out:
        args.out.write_text(tables(result), encoding="utf-8")
    return {"cpu": cpu(exact=False), "shapes": result}


def probe(nbytes: int, *, int8_inputs: bool = False) -> ComputeProbe:
    """What times our formats as the runtime computes with them, with weights of its own."""
    device = make_device("cpu")
    return ComputeProbe(device, 1, weight_block(device, nbytes), Products(exact=False, int8_inputs=int8_inputs))


def plain_ways() -> dict[str, tuple[Linear, Prepare]]:
    """Every plain call: how it multiplies, and how it wants a matrix."""
    functional, theirs, aten = bitsandbytes(), torch.ops.bitsandbytes, torch.ops.aten
    levels = functional.get_4bit_type("nf4", device="cpu")
    found: dict[str, tuple[Linear, Prepare]] = {
        "torch bf16": (lambda x, w, n, k: linear(x, w["weight"]), lambda weight: {"weight": weight.to(BF16)}),
        "torch fp32": (lambda x, w, n, k: linear(x.float(), w["weight"]), lambda weight: {"weight": weight}),
        "torch int8": (
            lambda x, w, n, k: aten._weight_int8pack_mm(x, w["codes"], w["scales"]),
            FORMATS["int8"].encode,
        ),
        "torch int4": (lambda x, w, n, k: aten._weight_int4pack_mm_for_cpu(x, w["codes"], 64, w["groups"]), int4),
        "bitsandbytes matmul_4bit": (  # what it calls without a gradient
            lambda x, w, n, k: theirs.gemm_4bit(x, w["codes"].view(-1, 1), (n, k), w["absmax"], 64, "nf4"),
            FORMATS["nf4"].encode,
        ),
    }
    if functional.has_avx512bf16():
        found["bitsandbytes packed"] = (
            lambda x, w, n, k: theirs.gemv_4bit(x, w["codes"], (n, k), w["absmax"], levels, 64),
            packed_by_bitsandbytes,
        )
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


def plain(multiply: Linear, prepare: Prepare, weights: Weights, nbytes: int) -> Compute:
    """An expert by plain calls, with as many copies as fill `nbytes`."""
    first = [prepare(weight) for weight in weights]
    copies = max(2, nbytes // sum(tensor.nbytes for matrix in first for tensor in matrix.values()))
    experts = itertools.cycle(
        [[{name: tensor.clone() for name, tensor in matrix.items()} for matrix in first] for _ in range(copies)]
    )
    hidden, inner = weights[1].shape
    inputs = {tokens: torch.ones(tokens, hidden, dtype=BF16) for tokens in TOKENS}

    def compute(tokens: int) -> None:
        gate_up, down = next(experts)
        both = multiply(inputs[tokens], gate_up, 2 * inner, hidden)
        multiply(silu(both[:, :inner]) * both[:, inner:], down, hidden, inner)

    return compute


def compare(contenders: Mapping[str, Compute], tokens: int, repetitions: int) -> dict[str, float]:
    """Median milliseconds of one expert on `tokens` tokens, by contender; they take turns."""
    calls = {label: timed(partial(compute, tokens), time.thread_time) for label, compute in contenders.items()}
    medians = {label: 1e3 * median(seconds) for label, seconds in take_turns(calls, repetitions).items()}
    note(f"{tokens} tokens: " + ", ".join(f"{label} {ms:.3f}" for label, ms in medians.items()))
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


def gflops(times: dict[int, dict[str, float]], hidden: int, inner: int) -> dict[int, dict[str, float]]:
    """Billions of operations a second, by tokens and contender."""
    operations = 2 * 3 * hidden * inner
    return {
        tokens: {label: round(tokens * operations / ms / 1e6, 1) for label, ms in row.items()}
        for tokens, row in times.items()
    }


def packing(weights: Weights, nbytes: int) -> dict[str, float]:
    """Milliseconds to pack what was read of one expert, for levels that are packed, beside bitsandbytes' function."""
    found = {}
    for level, form in LEVELS.items():
        hidden, inner = weights[1].shape
        if bytes_per_s := probe(nbytes).packing_bytes_per_s(level, (hidden, inner)):
            fields = (*form.stored(2 * inner, hidden, level), *form.stored(hidden, inner, level))
            found[level] = 1e3 * sum(field.nbytes for field in fields) / bytes_per_s
    functional = bitsandbytes()
    if functional.has_avx512bf16():
        quantised = [functional.quantize_4bit(weight, blocksize=64, quant_type="nf4") for weight in weights]
        # It changes the state that it is given.
        found["bitsandbytes"] = median_ms(
            lambda: [functional._convert_weight_packed_for_cpu(codes, copy(state)) for codes, state in quantised]
        )
    return found


def encode(form: Format, weights: Weights) -> None:
    """One expert."""
    for weight in weights:
        form.encode(weight)


def median_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of the processor over four calls, after one that warms up."""
    return 1e3 * median([timed(call, time.thread_time)() for _ in range(5)][1:])


def tables(result: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    shapes = list(result.values())

    def by_tokens(figures: Iterable[Mapping[int, float]]) -> list[str]:
        return [" / ".join(f"{each[tokens]:.2f}" for tokens in TOKENS) for each in figures]

    lines = [
        [label, *by_tokens({tokens: row[label] for tokens, row in shape["ms"].items()} for shape in shapes)]
        for label in shapes[0]["ms"][TOKENS[0]]
    ]
    speeds = [
        [label, *(" / ".join(f"{shape['gflops'][tokens][label]:.0f}" for tokens in TOKENS) for shape in shapes)]
        for label in shapes[0]["ms"][TOKENS[0]]
    ]
    lines += [
        [f"{level} over the best plain call", *by_tokens(shape["ratio"][level] for shape in shapes)] for level in PLAIN
    ]
    conversions = [
        [f"{kind} {label}", *(f"{shape['per_expert_ms'][kind][label]:.2f}" for shape in shapes)]
        for kind in ("pack", "encode")
        for label in shapes[0]["per_expert_ms"][kind]
    ]
    return "\n".join(
        markdown(table, rows)
        for table, rows in (
            (["ms", *result], lines),
            (["GFLOP/s", *result], speeds),
            (["ms per expert", *result], conversions),
        )
    )


if __name__ == "__main__":
    arguments = Arguments(__doc__, repetitions=40)
    arguments.option("--shapes", list(SHAPES), "of experts", choices=SHAPES)
    arguments.option("--rotate-bytes", "400M", "weights that each contender cycles through", type=size)
    arguments.option("--out", None, "write the tables there, as Markdown", type=Path)
    raise SystemExit(arguments.run(benchmark))
