"""Loading inside a budget: peak memory of load + generated tokens, outside and inside a memory cgroup.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 3 --out /data/qwen3-3l
    python scripts/bench/load.py /data/qwen3-3l

Three runs, each in a process of its own: on the CPU within --cpu-mem, the same inside a memory cgroup of
--memory (where page cache counts), and on the emulated accelerator, whose memory is host memory too. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offload.system.sizes import format_bytes, parse_bytes
from scripts.bench.common import (
    Answer,
    Request,
    Worker,
    drop_page_cache,
    note,
    random_ids,
    run,
    serve,
    shards,
    worker_command,
)

RUNS = ("cpu", "cgroup", "emulated")


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run all three and compare each peak with its budget."""
    files = shards(args.checkpoint)
    cpu_mem, gpu_mem = parse_bytes(args.cpu_mem, "--cpu-mem"), parse_bytes(args.gpu_mem, "--gpu-mem")
    runs = {}
    for name in RUNS:
        memory = parse_bytes(args.memory, "--memory") if name == "cgroup" else None
        drop_page_cache(files)
        with Worker(name, worker_command(__file__, args.argv, "--worker", name), memory) as process:
            answer = process.ask()
            usage = process.usage()
        budget = cpu_mem + gpu_mem if name == "emulated" else cpu_mem
        runs[name] = {
            "budget_bytes": budget,
            "peak_rss_bytes": process.peak_rss_bytes,
            "within_budget": process.peak_rss_bytes <= budget,
            **({"cgroup_bytes": usage.limit_bytes, "cgroup_peak_bytes": usage.peak_bytes} if usage else {}),
            **answer,
        }
        note(f"{name}: peak RSS {format_bytes(process.peak_rss_bytes)} of {format_bytes(budget)}")
    return {
        "benchmark": "load",
        "checkpoint": args.checkpoint.name,
        "checkpoint_bytes": sum(path.stat().st_size for path in files),
        "tokens": args.tokens,
        "runs": runs,
        "within_budget": all(result["within_budget"] for result in runs.values()),
    }


def load_and_generate(args: argparse.Namespace) -> Callable[[Request], Answer]:
    """One run: load, generate, and answer with what that took."""
    import torch

    from offload.model import OffloadedModel

    vocab = json.loads((args.checkpoint / "config.json").read_text())["vocab_size"]
    prompt = torch.tensor([random_ids(args.prompt, vocab, args.seed)])
    emulated = args.worker == "emulated"
    began = time.perf_counter()
    with OffloadedModel.from_pretrained(
        args.checkpoint,
        cpu_mem=args.cpu_mem,
        gpu_mem=args.gpu_mem if emulated else None,
        context=args.prompt + args.tokens,
        device="emulated" if emulated else "cpu",
    ) as model:
        loaded = time.perf_counter()
        output = model.generate(prompt.to(model.device), max_new_tokens=args.tokens, do_sample=False)
        answer = {
            "load_s": loaded - began,
            "generate_s": time.perf_counter() - loaded,
            "generated": int(output.shape[1]) - args.prompt,
            "stats": model.stats.as_dict(),
        }
    return lambda request: answer


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder that scripts/bench/make_checkpoint.py wrote")
    parser.add_argument("--cpu-mem", default="1.5GB", help="the budget (default 1.5GB)")
    parser.add_argument("--gpu-mem", default="1GB", help="the emulated accelerator's (default 1GB)")
    parser.add_argument("--memory", default="1.6GB", help="the memory cgroup (default 1.6GB)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (default 16)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompt (default 0)")
    parser.add_argument("--worker", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.worker:
        return serve(lambda: load_and_generate(args))
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
