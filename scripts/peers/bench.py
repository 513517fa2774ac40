"""Decode beside what else there is: llama.cpp, accelerate, AirLLM and plain transformers, in the same RAM.

    python scripts/peers/bench.py --llama-python LLAMA/bin/python --airllm-python AIRLLM/bin/python --out peers.md

Each engine is a process alone in a memory cgroup, page cache included. All cgroups of a case are of the same size, a
fraction of the model at the case's bits. All engines are loaded, fed the same fixed ids one a step, and take turns. A
peer that cannot run a case says why. --quick compares one shape at one budget.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

from cache.traces.trace import Trace
from offload.system.sizes import format_bytes
from scripts.bench.common import Args, Arguments, Result, note, random_ids, run, size
from scripts.bench.machine import memory_bytes_per_s
from scripts.bench.serve import same_choices
from scripts.peers.case import Case, Record, Tokens, measure, our_figures, reference
from scripts.peers.engines import GROUPS, VOCAB, Files, Group, Pythons
from scripts.peers.tables import markdown

SHAPES = list(GROUPS[0].layers)
QUICK_SHAPE, QUICK_LAYERS = "olmoe", {"16 bits": 3, "4.5 bits": 6}
QUICK = {"repetitions": 3, "tokens": 12, "warm_up": 12, "prompt": 32}
TINY = {"hidden": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "intermediate": 128, "experts": 8, "top_k": 2}


def benchmark(args: Args) -> Result:
    """Every group of every shape at every budget."""
    memory = memory_bytes_per_s(args.threads)
    cases = []
    for shape in args.shapes:
        for layers, groups in _by_layers(shape, args).items():
            files = Files(shape, layers, args.work / f"{shape}-{layers}l", small=TINY if args.tiny else None)
            expected: dict[Path | None, Record] = {}
            try:
                for group in groups:
                    cases += list(_cases(files, shape, group, expected, memory, args))
            finally:
                if not args.keep and files.folder.exists():
                    files.remove()
    first = {case["group"]: case["decode_tokens_per_s"] for case in reversed(cases)}
    result = {
        "benchmark": "peers",
        "memory_bytes_per_s": memory,
        # Of the first shape at the first budget: all there is with --quick.
        "decode_tokens_per_s": {name: speed for speeds in first.values() for name, speed in speeds.items()},
        "cases": cases,
    }
    if args.out:
        args.out.write_text(markdown(cases))
    return result


def _by_layers(shape: str, args: Args) -> dict[int, list[Group]]:
    """The groups, those of equally many layers together: they share a checkpoint."""
    found: dict[int, list[Group]] = {}
    for group in GROUPS:
        if args.bits not in (None, group.bits):
            continue
        if args.peers:
            group = replace(group, peers=tuple(name for name in group.peers if name in args.peers))
        own = QUICK_LAYERS[group.name] if args.quick else group.layers[shape]
        found.setdefault(args.layers or own, []).append(group)
    return found


def _cases(
    files: Files,
    shape: str,
    group: Group,
    expected: dict[Path | None, Record],
    memory: float,
    args: Args,
) -> Iterator[dict[str, Any]]:
    """Every budget of a group, routed by the model and, where it fits the shape, by the trace.

    `expected` has the references of this checkpoint, as far as there are any yet.
    """
    ids = random_ids(args.warm_up + args.repetitions * args.tokens + args.prompt, VOCAB, 0)
    first, last = args.warm_up, len(ids) - args.prompt
    windows = [ids[start : start + args.tokens] for start in range(first, last, args.tokens)]
    files.write(group.copies)
    pythons = Pythons(args.llama_python, args.airllm_python)
    unable = {name: why for name in group.engines if (why := files.prepare(name, pythons))}
    for trace in dict.fromkeys((None, args.trace)):
        if trace is not None and (why := _not_of_this_trace(files, trace)):
            note(f"{shape} is not routed by the trace: {why}")
            continue
        tokens = Tokens(ids[:first], windows, ids[last:], args.at_most_s, trace)
        for fraction in args.fractions:
            memory_bytes = args.memory or int(files.model_bytes(group.bits) * fraction)
            case = Case(group, files, pythons, tokens, memory_bytes, args.threads)
            if trace not in expected:
                expected[trace] = reference(case)
            where = f"{shape}, {files.family.layers} layers, {group.name}, {format_bytes(memory_bytes)} of RAM"
            note(where + (", routed by the trace" if trace else ""))
            records, disk = measure(case, unable)
            yield {
                "shape": shape,
                "layers": files.family.layers,
                "group": group.name,
                "model_bytes": files.model_bytes(group.bits),
                "memory_bytes": memory_bytes,
                "trace": trace and trace.name,
                "decode_tokens_per_s": {name: _median(record.tokens_per_s()) for name, record in records.items()},
                "repetitions": {name: record.tokens_per_s() for name, record in records.items()},
                "prefill_tokens_per_s": {name: _median(record.prefills()) for name, record in records.items()},
                "same_choices": {name: _same(record, expected[trace]) for name, record in records.items()},
                "unable": {name: record.unable for name, record in records.items() if record.unable},
                "cgroup_peak_bytes": {name: record.peak_bytes for name, record in records.items()},
                "resident_tokens_per_s": _median(expected[trace].tokens_per_s()),
                "ours": our_figures(records[group.ours], disk, memory),
            }


def _not_of_this_trace(files: Files, path: Path) -> str | None:
    """Why the model cannot be routed by the trace, or None."""
    trace, family = Trace.open(path), files.family
    _, layers, top_k = trace.experts.shape
    has, needs = (layers, trace.num_experts, top_k), (family.layers, family.experts, family.top_k)
    if has[1:] == needs[1:] and layers >= needs[0]:
        return None
    return "the trace has {} layers, {} experts, top {}, the model {}, {} and {}".format(*has, *needs)


def _same(record: Record, reference: Record) -> tuple[int, int] | None:
    """(tokens that are the reference's, tokens compared); None without either."""
    same = same_choices(record.windows, reference.windows)
    return (sum(same), len(same)) if same else None


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _fractions(text: str) -> list[float]:
    """Numbers such as 1/2, separated by commas."""
    try:
        return [float(Fraction(part)) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give fractions such as 1/2,1/3") from error


if __name__ == "__main__":
    arguments = Arguments(__doc__, quick=QUICK, tokens=16, warm_up=24, repetitions=5, prompt=64, threads=None)
    peers, here, work = [name for group in GROUPS for name in group.peers], Path(sys.executable), tempfile.gettempdir()
    arguments.positional("shapes", f"default: {' '.join(SHAPES)}, with --quick {QUICK_SHAPE}", nargs="*")
    arguments.option("--llama-python", here, "an interpreter with llama-cpp-python and gguf", type=Path)
    arguments.option("--airllm-python", here, "an interpreter with airllm", type=Path)
    arguments.option("--fractions", None, "of the model's bytes: the budgets, such as 1/2,1/3", type=_fractions)
    arguments.option("--peers", None, "these alone, beside ours", nargs="+", choices=peers)
    arguments.option("--bits", None, "one group alone", type=float, choices=[group.bits for group in GROUPS])
    arguments.option("--memory", None, "one budget for everything, instead of fractions", type=size)
    arguments.option("--trace", None, "in addition, route shapes that it fits by this trace's first layers", type=Path)
    arguments.option("--at-most-s", None, "ends a repetition early", type=float)
    arguments.option("--layers", None, "of each shape, instead of its own number", type=int)
    arguments.option("--tiny", False, "small layers instead of their true shape")
    arguments.option("--work", Path(work, "offload-peers"), "for models: 25 GB", type=Path)
    arguments.option("--keep", False, "leave the models there, for the next run")
    arguments.option("--out", None, "write tables in Markdown to this file", type=Path)
    args = arguments.parse()
    args.shapes = args.shapes or ([QUICK_SHAPE] if args.quick else SHAPES)
    args.fractions = [1] if args.memory else args.fractions or ([1 / 2] if args.quick else [1 / 2, 1 / 3])
    args.at_most_s = args.at_most_s or (3 if args.quick else 5)
    if unknown := set(args.shapes) - set(SHAPES):
        arguments.error(f"no such shape: {', '.join(sorted(unknown))}")
    raise SystemExit(run(benchmark, args))
