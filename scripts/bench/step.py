"""A decode step with everything in memory, at 16 and at 4.5 bits: time a token, beside what memory allows.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 4 --out /data/qwen3-4l
    python scripts/bench/step.py /data/qwen3-4l

`--against FOLDER` takes the same steps with another checkout of this project, its extension built in place, such as one
of the commit before: what a change has brought, side by side. Engines are processes of their own and take turns. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench.common import BenchmarkError, Worker, default_threads, note, random_ids, run

ENGINES = ("ours-bf16", "ours-nf4")
CONTEXT = 256
PROMPTS = 12  # of CONTEXT tokens, which between them visit every expert


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Load every engine, make every expert resident, let them take turns."""
    import torch

    from offload.machine.memory import host_read_bytes_per_s

    vocab = json.loads((args.checkpoint / "config.json").read_text())["vocab_size"]
    memory_bytes_per_s = host_read_bytes_per_s(torch.zeros(1 << 29, dtype=torch.uint8), args.threads)
    step_s: dict[str, list[float]] = {}
    touched: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="offload-step-") as store, ExitStack() as stack:
        workers = {}
        for engine in args.engines:
            for name, folder in ((engine, None), (f"{engine}, before", args.against)):
                if name != engine and folder is None:
                    continue
                note(f"loading {name}")
                worker = workers[name] = stack.enter_context(Worker(name, _command(engine, folder, Path(store), args)))
                for seed in range(PROMPTS):
                    worker.ask(ids=random_ids(CONTEXT, vocab, seed), prefill=True)
        for repetition in range(args.repetitions):
            ids = random_ids(args.tokens, vocab, PROMPTS + repetition)
            for name in workers if repetition % 2 == 0 else reversed(workers):
                answer = workers[name].ask(ids=ids)
                if (hit_rate := answer["stats"]["hit_rate"]) < 1:
                    raise BenchmarkError(f"{name}: hit rate {hit_rate:.1%}: free memory until all experts fit")
                step_s.setdefault(name, []).append(median(answer["seconds"]))
                touched[name] = answer["stats"]["touched_bytes_per_token"]
                note(f"repetition {repetition + 1}: {name} {1000 * step_s[name][-1]:.1f} ms a token")
    return {
        "benchmark": "step",
        "checkpoint": args.checkpoint.name,
        "threads": args.threads,
        "tokens": args.tokens,
        "repetitions": args.repetitions,
        "memory_bytes_per_s": memory_bytes_per_s,
        **{
            name: {
                "s_per_token": (seconds := median(times)),
                "touched_bytes_per_token": touched[name],
                "share_of_memory": touched[name] / seconds / memory_bytes_per_s,
            }
            for name, times in step_s.items()
        },
        "ratios": {
            name: median(after / before for after, before in zip(times, step_s[f"{name}, before"], strict=True))
            for name, times in step_s.items()
            if f"{name}, before" in step_s
        },
    }


def _command(engine: str, checkout: Path | None, store: Path, args: argparse.Namespace) -> list[str]:
    """This checkout's worker of an engine, with the packages of `checkout`, or of here.

    Of another checkout only what stays is used: `OffloadedModel`. Each has its own store: forms may differ.
    """
    packages = Path(__file__).resolve().parents[2] if checkout is None else checkout.resolve()
    worker = Path(__file__).resolve().parents[1] / "peers" / "torch_worker.py"
    folder = store / ("here" if checkout is None else "there") / engine
    arguments = [engine, args.checkpoint, "--threads", args.threads, "--context", CONTEXT, "--folder", folder]
    return ["env", f"PYTHONPATH={packages}", sys.executable, str(worker), *map(str, arguments)]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder that scripts/bench/make_checkpoint.py wrote")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: all")
    parser.add_argument("--against", type=Path, help="another checkout, to compare with")
    parser.add_argument("--tokens", type=int, default=100, help="decoded tokens a repetition (default 100)")
    parser.add_argument("--repetitions", type=int, default=7, help="default 7")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of each engine (default: all cores)")
    return run(lambda: benchmark(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
