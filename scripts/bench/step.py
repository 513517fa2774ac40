"""A decode step with everything in memory: time a token, beside what memory allows and beside plain transformers.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 4 --out /data/qwen3-4l
    python scripts/bench/step.py /data/qwen3-4l
    python scripts/bench/step.py /data/qwen3-4l --engines ours-bf16 transformers

`--against FOLDER` takes the same steps with another checkout of this project, its extension built in place, such as one
of the commit before: what a change has brought, side by side. Engines are processes of their own and take turns. Ratios
are those of times to the other checkout's, or to the last engine's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench.common import (
    Arguments,
    BenchmarkError,
    note,
    random_ids,
    ratio,
    show,
    turns,
    vocabulary,
)
from scripts.bench.machine import memory_bytes_per_s
from scripts.bench.workers import Worker, engine_command

ENGINES: dict[str, dict[str, Any]] = {
    "ours-bf16": {"engine": "offload"},
    "ours-nf4": {"engine": "offload", "experts": "nf4", "dense": "nf4"},
    "transformers": {"engine": "transformers"},
}
PROMPTS = 12  # which between them visit every expert


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Load every engine, make every expert resident, let them take turns."""
    vocab, memory = vocabulary(args.checkpoint), memory_bytes_per_s(args.threads)
    prompt = random_ids(args.prompt, vocab, 0)
    samples: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="offload-step-") as store, ExitStack() as stack:
        workers = {}
        for name, command in _commands(args, Path(store)).items():
            workers[name] = stack.enter_context(Worker(name, command))
            for seed in range(PROMPTS):
                workers[name].ask(ids=random_ids(args.prompt, vocab, seed), prefill=True)
        for repetition, name in turns(workers, args.repetitions):
            (prompt_s,) = workers[name].ask(ids=prompt, prefill=True)["seconds"]
            answer = workers[name].ask(ids=random_ids(args.tokens, vocab, PROMPTS + repetition))
            if (hit_rate := answer["stats"].get("hit_rate", 1)) < 1:
                raise BenchmarkError(f"{name}: hit rate {hit_rate:.1%}: free memory until all experts fit")
            samples.setdefault(name, []).append(answer | {"step_s": median(answer["seconds"]), "prompt_s": prompt_s})
            note(f"repetition {repetition + 1}: {name} {1000 * samples[name][-1]['step_s']:.1f} ms a token")
    rows = {}
    for name, own in samples.items():
        others = samples.get(f"{name}, before", list(samples.values())[-1])
        rows[name] = _figures(own, others, args.prompt, memory)
    show(rows)
    ratios = {name: row["ratio"] for name, row in rows.items() if samples[name] is not list(samples.values())[-1]}
    return {"memory_bytes_per_s": memory, **rows, "ratios": ratios}


def _commands(args: argparse.Namespace, store: Path) -> dict[str, list[str]]:
    """The workers, by name. Each has its own store of converted experts: another checkout's may differ."""
    commands = {}
    for engine in args.engines:
        for name, checkout in ((engine, None), (f"{engine}, before", args.against)):
            ours = ENGINES[engine]["engine"] == "offload"
            if name != engine and not (ours and checkout):
                continue
            options = ENGINES[engine] | {"threads": args.threads}
            if ours:
                options["context"] = max(args.prompt, args.tokens)
            if "experts" in options:
                options["expert_store"] = store / name.replace(", ", "-")
            commands[name] = engine_command(checkpoint=args.checkpoint, checkout=checkout, **options)
    return commands


def _figures(own: list[dict[str, Any]], others: list[dict[str, Any]], prompt: int, memory: float) -> dict[str, Any]:
    """Medians over the repetitions, and of ratios to `others`."""
    s_per_token = median(each["step_s"] for each in own)
    pairs = [
        (a, b)
        for mine, other in zip(own, others, strict=True)
        for a, b in zip(mine["chosen"], other["chosen"], strict=True)
    ]
    touched = own[0]["stats"].get("touched_bytes_per_token")
    return {
        "s_per_token": s_per_token,
        "ratio": ratio(*([each["step_s"] for each in side] for side in (own, others))),
        "prefill_tokens_per_s": prompt / median(each["prompt_s"] for each in own),
        "prefill_ratio": ratio(*([each["prompt_s"] for each in side] for side in (own, others))),
        "same_choice": sum(a == b for a, b in pairs) / len(pairs),
        "touched_bytes_per_token": touched,
        "share_of_memory": touched and touched / s_per_token / memory,
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, "checkpoint", prompt=256, tokens=100, repetitions=7, threads=None)
    arguments.option("--engines", ["ours-bf16", "ours-nf4"], "in turn", choices=ENGINES)
    arguments.option("--against", None, "another checkout, to compare with", type=Path)
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
