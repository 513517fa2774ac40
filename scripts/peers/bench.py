"""Decode beside what else there is: llama.cpp, accelerate, AirLLM and plain transformers, in the same RAM.

    python scripts/peers/bench.py --llama-python LLAMA/bin/python --airllm-python AIRLLM/bin/python --out peers.md

Each engine is a process alone in a memory cgroup, page cache included. All cgroups of a case are of the same size, a
fraction of the model at the case's bits. All engines are loaded, fed the same fixed ids one a step, and take turns. A
peer that cannot run a case says why. --quick compares one shape at one budget. The last line is JSON.
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

from cache.errors import OffloadError
from offload.system.sizes import format_bytes, parse_bytes
from scripts.bench.common import default_threads, note, random_ids, run
from scripts.peers.case import Record, Tokens, measure, our_figures, reference, same_choices
from scripts.peers.engines import GROUPS, VOCAB, Files, Group, Pythons
from scripts.peers.tables import markdown

QUICK_SHAPE, QUICK_LAYERS = "olmoe", {"16 bits": 3, "4.5 bits": 6}
FULL = {"repetitions": 5, "tokens": 16, "warm_up": 24, "prompt": 64, "at_most_s": 5}
QUICK = {"repetitions": 3, "tokens": 12, "warm_up": 12, "prompt": 32, "at_most_s": 3}
TINY = {"hidden": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "intermediate": 128, "experts": 8, "top_k": 2}


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Every group of every shape at every budget."""
    ids = random_ids(args.warm_up + args.repetitions * args.tokens + args.prompt, VOCAB, args.seed)
    first, last = args.warm_up, len(ids) - args.prompt
    windows = [ids[start : start + args.tokens] for start in range(first, last, args.tokens)]
    tokens = Tokens(ids[:first], windows, ids[last:], args.at_most_s)
    memory_bytes_per_s = _memory_bytes_per_s(args.threads)
    cases = []
    for shape in args.shapes:
        for layers, groups in _by_layers(shape, args).items():
            files = Files(shape, layers, args.work / f"{shape}-{layers}l", small=TINY if args.tiny else None)
            expected: dict[Path | None, Record] = {}
            try:
                for group in groups:
                    cases += list(_cases(files, shape, group, tokens, expected, memory_bytes_per_s, args))
            finally:
                if not args.keep and files.folder.exists():
                    files.remove()
    result = {
        "benchmark": "peers",
        "threads": args.threads,
        "tokens": args.tokens,
        "warm_up": args.warm_up,
        "repetitions": args.repetitions,
        "prompt": args.prompt,
        "memory_bytes_per_s": memory_bytes_per_s,
        # Of the first shape at the first budget: all there is with --quick.
        "decode_tokens_per_s": {
            name: speed for case in reversed(_first(cases)) for name, speed in case["decode_tokens_per_s"].items()
        },
        "cases": cases,
    }
    if args.out:
        args.out.write_text(markdown(result))
    return result


def _by_layers(shape: str, args: argparse.Namespace) -> dict[int, list[Group]]:
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
    tokens: Tokens,
    expected: dict[Path | None, Record],
    memory_bytes_per_s: float,
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Every budget of a group, routed by the model and, where it fits the shape, by the trace.

    `expected` has the references of this checkpoint, as far as there are any yet.
    """
    files.write(group.copies)
    pythons = Pythons(args.llama_python, args.airllm_python)
    unable = {name: why for name in group.engines if (why := files.prepare(name, pythons))}
    for trace in dict.fromkeys((None, args.trace)):
        if trace is not None and (why := _not_of_this_trace(files, trace)):
            note(f"{shape} is not routed by the trace: {why}")
            continue
        if trace not in expected:
            expected[trace] = reference(files, pythons, tokens, args.threads, trace)
        for fraction in args.fractions:
            memory_bytes = args.memory or int(files.model_bytes(group.bits) * fraction)
            where = f"{shape}, {files.family.layers} layers, {group.name}, {format_bytes(memory_bytes)} of RAM"
            note(where + (", routed by the trace" if trace else ""))
            records, disk = measure(
                group,
                files,
                pythons,
                tokens,
                memory_bytes=memory_bytes,
                threads=args.threads,
                trace=trace,
                unable=unable,
            )
            yield {
                "shape": shape,
                "layers": files.family.layers,
                "group": group.name,
                "model_bytes": files.model_bytes(group.bits),
                "memory_bytes": memory_bytes,
                "trace": trace and trace.name,
                "decode_tokens_per_s": {name: _median(record.tokens_per_s()) for name, record in records.items()},
                "repetitions": {name: record.tokens_per_s() for name, record in records.items()},
                "prefill_tokens_per_s": {name: _prefill(record, tokens) for name, record in records.items()},
                "same_choices": {name: same_choices(record, expected[trace]) for name, record in records.items()},
                "unable": {name: record.unable for name, record in records.items() if record.unable},
                "cgroup_peak_bytes": {name: record.peak_bytes for name, record in records.items()},
                "resident_tokens_per_s": _median(expected[trace].tokens_per_s()),
                "ours": our_figures(records[group.ours], disk, memory_bytes_per_s),
            }


def _not_of_this_trace(files: Files, path: Path) -> str | None:
    """Why the model cannot be routed by the trace, or None."""
    from cache.traces.trace import Trace

    trace, family = Trace.open(path), files.family
    _, layers, top_k = trace.experts.shape
    has, needs = (layers, trace.num_experts, top_k), (family.layers, family.experts, family.top_k)
    if has[1:] == needs[1:] and layers >= needs[0]:
        return None
    return "the trace has {} layers, {} experts, top {}, the model {}, {} and {}".format(*has, *needs)


def _memory_bytes_per_s(threads: int) -> float:
    """How fast the machine reads memory."""
    import torch

    from offload.machine.memory import host_read_bytes_per_s

    return host_read_bytes_per_s(torch.zeros(1 << 29, dtype=torch.uint8), threads)


def _first(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One case of each group."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        found.setdefault(case["group"], case)
    return list(found.values())


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _prefill(record: Record, tokens: Tokens) -> float | None:
    return _median([len(tokens.prompt) / sum(answer["seconds"]) for answer in record.prompts])


def _fractions(text: str) -> list[float]:
    """Numbers such as 1/2, separated by commas."""
    try:
        return [float(Fraction(part)) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: give fractions such as 1/2,1/3") from error


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except OffloadError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    shapes = list(GROUPS[0].layers)
    peers = [name for group in GROUPS for name in group.peers]
    parser.add_argument("shapes", nargs="*", help=f"default: {' '.join(shapes)}")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SHAPE} with few layers, three short repetitions")
    here = Path(sys.executable)
    parser.add_argument("--llama-python", type=Path, default=here, help="an interpreter with llama-cpp-python and gguf")
    parser.add_argument("--airllm-python", type=Path, default=here, help="an interpreter with airllm")
    parser.add_argument("--fractions", type=_fractions, help="of the model's bytes: the budgets (default 1/2,1/3)")
    parser.add_argument("--peers", nargs="+", choices=peers, help="these alone, beside ours (default: all)")
    parser.add_argument("--bits", type=float, choices=[group.bits for group in GROUPS], help="one group alone")
    parser.add_argument("--memory", type=_size, help="one budget for everything, instead of fractions")
    parser.add_argument(
        "--trace", type=Path, help="in addition, route shapes that it fits by this trace's first layers"
    )
    parser.add_argument("--tokens", type=int, help="measured tokens a repetition (default 16, with --quick 12)")
    parser.add_argument("--warm-up", type=int, help="tokens before the first (default 24, with --quick 12)")
    parser.add_argument("--repetitions", type=int, help="default 5, with --quick 3")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt at the end (default 64, with --quick 32)")
    parser.add_argument("--at-most-s", type=float, help="ends a repetition early (default 5, with --quick 3)")
    parser.add_argument("--layers", type=int, help="of each shape, instead of its own number")
    parser.add_argument("--tiny", action="store_true", help="small layers instead of their true shape")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of each engine (default: all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens (default 0)")
    default_work = Path(tempfile.gettempdir()) / "offload-peers"
    parser.add_argument("--work", type=Path, default=default_work, help=f"for models: 25 GB (default {default_work})")
    parser.add_argument("--keep", action="store_true", help="leave the models there, for the next run")
    parser.add_argument("--out", type=Path, help="write tables in Markdown to this file")
    args = parser.parse_args(argv)
    args.shapes = args.shapes or ([QUICK_SHAPE] if args.quick else shapes)
    args.fractions = args.fractions or ([1 / 2] if args.quick else [1 / 2, 1 / 3])
    if args.memory:
        args.fractions = [1]
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if unknown := set(args.shapes) - set(shapes):
        parser.error(f"no such shape: {', '.join(sorted(unknown))}")
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
