"""Everything resident: our time per token against plain transformers with `grouped_mm`, the same threads.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 3 --out /data/qwen3-3l
    python scripts/bench/resident.py /data/qwen3-3l

Both engines are loaded at once, in processes of their own, fed the same fixed random tokens, and take turns.
The goal is a ratio of at most 1.15. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench.common import (
    Answer,
    BenchmarkError,
    Request,
    Worker,
    default_threads,
    note,
    random_ids,
    run,
    serve,
    worker_command,
)

ENGINES = ("offload", "transformers")
WARM_UP = 8  # prompts, which between them visit every expert


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Load both engines, make every expert resident, let them take turns, and compare."""
    vocab = json.loads((args.checkpoint / "config.json").read_text())["vocab_size"]
    ids = random_ids(args.prompt + args.tokens * args.repetitions, vocab, args.seed)
    prompt = ids[: args.prompt]
    decode_s: dict[str, list[float]] = {name: [] for name in ENGINES}
    prefill_s: dict[str, list[float]] = {name: [] for name in ENGINES}
    agree: list[bool] = []
    with ExitStack() as stack:
        workers = {}
        for name in ENGINES:
            note(f"loading {name}")
            command = worker_command(__file__, args.argv, "--worker", name)
            workers[name] = stack.enter_context(Worker(name, command))
            for seed in range(WARM_UP):
                workers[name].ask(ids=random_ids(args.prompt, vocab, seed), prefill=True)
        for repetition in range(args.repetitions):
            start = args.prompt + repetition * args.tokens
            chosen = {}
            for name in ENGINES if repetition % 2 == 0 else reversed(ENGINES):
                prefill_s[name] += workers[name].ask(ids=prompt, prefill=True)["seconds"]
                answer = workers[name].ask(ids=ids[start : start + args.tokens])
                decode_s[name].append(median(answer["seconds"]))
                chosen[name] = answer["chosen"]
                if name == "offload" and (hit_rate := answer["stats"]["hit_rate"]) < 0.99:
                    raise BenchmarkError(f"hit rate {hit_rate:.1%}: free memory until all experts fit")
                note(f"repetition {repetition + 1}: {name} {1000 * decode_s[name][-1]:.1f} ms a token")
            agree += [a == b for a, b in zip(*chosen.values(), strict=True)]
    return {
        "benchmark": "resident",
        "checkpoint": args.checkpoint.name,
        "threads": args.threads,
        "tokens": args.tokens,
        "repetitions": args.repetitions,
        **{f"{name}_s_per_token": median(times) for name, times in decode_s.items()},
        "ratio": median(ours / theirs for ours, theirs in zip(*decode_s.values(), strict=True)),
        **{f"{name}_prefill_tokens_per_s": args.prompt / median(times) for name, times in prefill_s.items()},
        "prefill_ratio": median(ours / theirs for ours, theirs in zip(*prefill_s.values(), strict=True)),
        "same_choice": sum(agree) / len(agree),
    }


def engine(args: argparse.Namespace) -> Callable[[Request], Answer]:
    """Load the worker's engine."""
    from scripts.bench import engines

    if args.worker == "offload":
        context = max(args.prompt, args.tokens)
        loaded = engines.load_offload(args.checkpoint, args.threads, None, context)
    else:
        loaded = engines.load_transformers(args.checkpoint, args.threads)
    return engines.handler(loaded)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder that scripts/bench/make_checkpoint.py wrote")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prefill (default 256)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens a repetition (default 32)")
    parser.add_argument("--repetitions", type=int, default=7, help="default 7")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of each engine (default: all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens (default 0)")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.worker:
        return serve(lambda: engine(args))
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
