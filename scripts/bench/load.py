"""Loading inside a budget: peak memory of load + generated tokens, outside and inside a memory cgroup.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 3 --out /data/qwen3-3l
    python scripts/bench/load.py /data/qwen3-3l

Three runs, each in a process of its own: on the CPU within --cpu-mem, the same inside a memory cgroup of
--memory (where page cache counts), and on the emulated accelerator, whose memory is host memory too. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from offload.system.sizes import parse_bytes
from scripts.bench.common import Arguments, random_ids, show, vocabulary
from scripts.bench.storage import drop_page_cache, shards, size_bytes
from scripts.bench.workers import Worker, engine_command


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run all three and compare each peak with its budget."""
    cpu_mem, gpu_mem = parse_bytes(args.cpu_mem, "--cpu-mem"), parse_bytes(args.gpu_mem, "--gpu-mem")
    prompt = random_ids(args.prompt, vocabulary(args.checkpoint), 0)
    runs: dict[str, dict[str, Any]] = {}
    for name in ("cpu", "cgroup", "emulated"):
        emulated = name == "emulated"
        options = {"cpu_mem": cpu_mem, "gpu_mem": gpu_mem if emulated else None, "context": args.prompt + args.tokens}
        device = "emulated" if emulated else "cpu"
        drop_page_cache(shards(args.checkpoint))
        command = engine_command("offload", args.checkpoint, device=device, **options)
        with Worker(name, command, parse_bytes(args.memory, "--memory") if name == "cgroup" else None) as process:
            loaded = process.ask()
            answer = process.ask(ids=prompt, generate=args.tokens)
            usage = process.usage()
        budget = cpu_mem + gpu_mem if emulated else cpu_mem
        runs[name] = {
            "budget_bytes": budget,
            "peak_rss_bytes": process.peak_rss_bytes,
            "within_budget": process.peak_rss_bytes <= budget,
            **({"cgroup_bytes": usage.limit_bytes, "cgroup_peak_bytes": usage.peak_bytes} if usage else {}),
            "load_s": loaded["load_s"],
            "generate_s": answer["seconds"][0],
            "generated": len(answer["chosen"]),
            "stats": answer["stats"],
        }
    show(runs, columns=("budget_bytes", "peak_rss_bytes", "cgroup_peak_bytes", "load_s", "generate_s"))
    within = all(result["within_budget"] for result in runs.values())
    return {"checkpoint_bytes": size_bytes(args.checkpoint), "runs": runs, "within_budget": within}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = Arguments(__doc__, "checkpoint", prompt=16, tokens=64)
    arguments.option("--cpu-mem", "1.5GB", "the budget")
    arguments.option("--gpu-mem", "1GB", "the emulated accelerator's")
    arguments.option("--memory", "1.6GB", "the memory cgroup")
    return arguments.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
