"""Decode and prompts beside what else there is: llama.cpp, accelerate, AirLLM and plain transformers, in the same RAM.

    python scripts/peers/bench.py --llama-python LLAMA/bin/python --airllm-python AIRLLM/bin/python --out peers.md
    python scripts/peers/bench.py --resident --fractions none --prompts 64 512 2048 \\
        --llama-python avx2=LLAMA-AVX2/bin/python native=LLAMA/bin/python --out resident.md

Each engine is a process alone in a memory cgroup, page cache included. All cgroups of a case are of the same size, a
fraction of the model at the case's bits. With --resident engines hold everything in RAM, and llama.cpp repacks it. All
engines are loaded, fed the same fixed ids one a step, and take turns. A peer that cannot run a case says why. Each
processor level that --llama-python names is a case of its own, to which every engine keeps. --quick compares one shape
at one budget.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

from cache.traces.trace import Trace
from scripts.bench.common import Args, Arguments, Result, note, random_ids, run, size
from scripts.bench.machine import machine_line, memory_bytes_per_s
from scripts.bench.serve import same_choices
from scripts.bench.storage import read_ahead_kb
from scripts.peers.case import Case, Record, Tokens, measure, our_figures, reference
from scripts.peers.engines import GROUPS, STREAMING, VOCAB, Files, Group, Pythons, Settings
from scripts.peers.levels import LEVELS, NATIVE, described
from scripts.peers.tables import markdown

SHAPES = list(GROUPS[0].layers)
QUICK_SHAPE, QUICK_LAYERS = "olmoe", {"16 bits": 3, "4.5 bits": 6}
QUICK = {"repetitions": 3, "tokens": 12, "warm_up": 12}
TINY = {"hidden": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "intermediate": 128, "experts": 8, "top_k": 2}
VISITS, VISIT_TOKENS = 12, 256  # prompts that between them visit every expert


def benchmark(args: Args) -> Result:
    """Every group of every shape at every level and budget."""
    memory = memory_bytes_per_s(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    ahead = read_ahead_kb(args.work)
    where = f"{machine_line()}; read_ahead_kb of the disk: {'unknown' if ahead is None else ahead}"
    note(where)
    cases = []
    for shape in args.shapes:
        for layers, groups in _by_layers(shape, args).items():
            files = Files(shape, layers, args.work / f"{shape}-{layers}l", small=TINY if args.tiny else None)
            expected: dict[tuple[Path | None, str], Record] = {}
            try:
                for group in groups:
                    for measured in _measured(files, group, expected, args):
                        cases.append(_figures(*measured, memory))
                        if args.out:  # after each: the next may not end
                            args.out.write_text(markdown(cases, where))
            finally:
                if not args.keep and files.folder.exists():
                    files.remove()
    first = {case["group"]: case["decode_tokens_per_s"] for case in reversed(cases)}
    return {
        "benchmark": "peers",
        "memory_bytes_per_s": memory,
        "read_ahead_kb": ahead,
        # Of the first shape at the first level and budget: all there is with --quick.
        "decode_tokens_per_s": {name: speed for speeds in first.values() for name, speed in speeds.items()},
        "cases": cases,
    }


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


Measured = tuple[Case, dict[str, Record], list[float], Record]
"""A case, what its engines did, the disk's speed beside ours, and the reference."""


def _measured(
    files: Files, group: Group, expected: dict[tuple[Path | None, str], Record], args: Args
) -> Iterator[Measured]:
    """Every level and budget of a group, routed by the model and, where it fits the shape, by the trace.

    `expected` has the references of this checkpoint, as far as there are any yet.
    """
    files.write(group.copies)
    for trace in dict.fromkeys((None, args.trace)):
        if trace is not None and (why := _not_of_this_trace(files, trace)):
            note(f"{files.shape} is not routed by the trace: {why}")
            continue
        tokens = _tokens(trace, args)
        for level, python in args.llama_python:
            pythons = Pythons(python, args.airllm_python, level)
            unable = {name: why for name in group.engines if (why := files.prepare(name, pythons))}
            for memory_bytes in _budgets(files, group, args):
                settings = Settings(args.threads, tokens.context, memory_bytes, args.ubatch, dict(args.ours or []))
                case = Case(_taking_part(group, memory_bytes), files, pythons, tokens, settings)
                if (trace, level) not in expected:
                    expected[trace, level] = reference(case)
                note(case.described)
                records, disk = measure(case, unable)
                yield case, records, disk, expected[trace, level]


def _tokens(trace: Path | None, args: Args) -> Tokens:
    """What engines are fed, the same in every case."""
    lengths = [args.warm_up, *[args.tokens] * args.repetitions, *args.prompts]
    lengths += [VISIT_TOKENS] * VISITS if args.resident else []
    ids = iter(random_ids(sum(lengths), VOCAB, 0))
    warm_up, *parts = [[next(ids) for _ in range(length)] for length in lengths]
    first, last = args.repetitions, args.repetitions + len(args.prompts)
    return Tokens(warm_up, parts[:first], parts[first:last], parts[last:], args.at_most_s, trace)


def _budgets(files: Files, group: Group, args: Args) -> Iterator[int | None]:
    """Bytes of RAM for each engine; None is room for everything."""
    if args.resident:
        yield None
    if args.memory:
        yield args.memory
    for fraction in () if args.memory else args.fractions:
        yield int(files.model_bytes(group.bits) * fraction)


def _taking_part(group: Group, memory_bytes: int | None) -> Group:
    """Without those that cannot hold everything, where everything is resident."""
    if memory_bytes is not None:
        return group
    return replace(group, peers=tuple(name for name in group.peers if name not in STREAMING))


def _figures(case: Case, records: dict[str, Record], disk: list[float], expected: Record, memory: float) -> Result:
    """A case as JSON has it."""
    files, group, trace = case.files, case.group, case.tokens.trace
    lengths = sorted(map(len, case.tokens.prompts))
    return {
        "shape": files.shape,
        "layers": files.family.layers,
        "group": group.name,
        "level": described(case.pythons.level),
        "resident": case.resident,
        "model_bytes": files.model_bytes(group.bits),
        "memory_bytes": case.settings.memory_bytes,
        "trace": trace and trace.name,
        "decode_tokens_per_s": {name: _median(record.tokens_per_s()) for name, record in records.items()},
        "repetitions": {name: record.tokens_per_s() for name, record in records.items()},
        "prompt_tokens_per_s": {
            str(length): {name: _median(record.prefills(length)) for name, record in records.items()}
            for length in lengths
        },
        "same_choices": {name: _same(record, expected) for name, record in records.items()},
        "unable": {name: record.unable for name, record in records.items() if record.unable},
        "peak_bytes": {name: record.peak_bytes for name, record in records.items()},
        "resident_tokens_per_s": _median(expected.tokens_per_s()),
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
    if text == "none":
        return []
    try:
        return [float(Fraction(part)) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give fractions such as 1/2,1/3") from error


def _at_level(text: str) -> tuple[str, Path]:
    """An interpreter, after the processor level that its llama.cpp is built for."""
    level, given, path = text.partition("=")
    if not given:
        return NATIVE, Path(text)
    if level not in (*LEVELS, NATIVE):
        raise argparse.ArgumentTypeError(f"{text!r}: {level} is none of {', '.join((*LEVELS, NATIVE))}")
    return level, Path(path)


def _option(text: str) -> tuple[str, Any]:
    """An option of `from_pretrained`: its value as JSON has it, or as text."""
    name, given, value = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"{text!r}: write name=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _arguments() -> Arguments:
    arguments = Arguments(__doc__, quick=QUICK, tokens=16, warm_up=24, repetitions=5, threads=None)
    peers, here, work = [name for group in GROUPS for name in group.peers], Path(sys.executable), tempfile.gettempdir()
    llama = "interpreters with llama-cpp-python and gguf, each as LEVEL=PATH: " + ", ".join((*LEVELS, NATIVE))
    arguments.positional("shapes", f"default: {' '.join(SHAPES)}, with --quick {QUICK_SHAPE}", nargs="*")
    arguments.option("--llama-python", None, llama, type=_at_level, nargs="+")
    arguments.option("--airllm-python", here, "an interpreter with airllm", type=Path)
    arguments.option("--resident", False, "everything in RAM, before the budgets")
    arguments.option("--fractions", None, "of the model's bytes: the budgets, as 1/2,1/3; or none", type=_fractions)
    arguments.option("--peers", None, "these alone, beside ours", nargs="+", choices=peers)
    arguments.option("--bits", None, "one group alone", type=float, choices=[group.bits for group in GROUPS])
    arguments.option("--memory", None, "one budget for everything, instead of fractions", type=size)
    arguments.option("--prompts", None, "tokens of each prompt (default: 64, with --quick 32)", type=int, nargs="+")
    arguments.option("--ubatch", 512, "tokens that llama.cpp computes in one pass")
    arguments.option("--ours", None, "options of from_pretrained for ours, as name=value", type=_option, nargs="+")
    arguments.option("--trace", None, "in addition, route shapes that it fits by this trace's first layers", type=Path)
    arguments.option("--at-most-s", None, "ends a repetition early", type=float)
    arguments.option("--layers", None, "of each shape, instead of its own number", type=int)
    arguments.option("--tiny", False, "small layers instead of their true shape")
    arguments.option("--work", Path(work, "offload-peers"), "for models: 25 GB", type=Path)
    arguments.option("--keep", False, "leave the models there, for the next run")
    arguments.option("--out", None, "write tables in Markdown to this file", type=Path)
    return arguments


if __name__ == "__main__":
    arguments = _arguments()
    args = arguments.parse()
    args.shapes = args.shapes or ([QUICK_SHAPE] if args.quick else SHAPES)
    args.llama_python = args.llama_python or [(NATIVE, Path(sys.executable))]
    args.prompts = args.prompts or [32 if args.quick else 64]
    if args.fractions is None:
        args.fractions = [1 / 2] if args.quick else [1 / 2, 1 / 3]
    args.at_most_s = args.at_most_s or (3 if args.quick else 5)
    if unknown := set(args.shapes) - set(SHAPES):
        arguments.error(f"no such shape: {', '.join(sorted(unknown))}")
    if not (args.resident or args.memory or args.fractions):
        arguments.error("--fractions none leaves --resident")
    raise SystemExit(run(benchmark, args))
