"""Loading inside a budget: peak memory of load + generated tokens, outside and inside a memory cgroup.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 3 --out /data/qwen3-3l
    python scripts/bench/load.py /data/qwen3-3l

A table on standard error, and as the last line JSON.
"""

from __future__ import annotations

from typing import Any

from scripts.bench.common import Args, Arguments, Result, ids_for, show, size
from scripts.bench.storage import drop_page_cache, shards, size_bytes
from scripts.bench.workers import Worker, engine_command


def benchmark(args: Args) -> Result:
    """Run all three, each in a process of its own, and compare each peak with its budget."""
    prompt = ids_for(args.checkpoint, args.prompt, 0)
    cpu: dict[str, Any] = {"device": "cpu", "cpu_mem": args.cpu_mem, "context": args.prompt + args.tokens}
    options = {"cpu": cpu, "cgroup": cpu, "emulated": cpu | {"device": "emulated", "gpu_mem": args.gpu_mem}}
    runs: dict[str, Result] = {}
    for name, own in options.items():
        drop_page_cache(shards(args.checkpoint))
        command = engine_command("offload", args.checkpoint, **own)
        with Worker(name, command, args.memory if name == "cgroup" else None) as worker:
            loaded = worker.ask()
            answer = worker.ask(ids=prompt, generate=args.tokens)
            usage = worker.usage()
        budget = args.cpu_mem + own.get("gpu_mem", 0)  # the emulated accelerator's memory is host memory
        runs[name] = {
            "budget_bytes": budget,
            "peak_rss_bytes": worker.peak_rss_bytes,
            "within_budget": worker.peak_rss_bytes <= budget,
            **({"cgroup_bytes": usage.limit_bytes, "cgroup_peak_bytes": usage.peak_bytes} if usage else {}),
            "load_s": loaded["load_s"],
            "generate_s": answer["seconds"][0],
            "generated": len(answer["chosen"]),
            "stats": answer["stats"],
        }
    show(runs, columns=("budget_bytes", "peak_rss_bytes", "cgroup_peak_bytes", "load_s", "generate_s"))
    within = all(run["within_budget"] for run in runs.values())
    return {"checkpoint_bytes": size_bytes(args.checkpoint), "runs": runs, "within_budget": within}


if __name__ == "__main__":
    arguments = Arguments(__doc__, "checkpoint", prompt=16, tokens=64)
    arguments.option("--cpu-mem", "1.5GB", "the budget", type=size)
    arguments.option("--gpu-mem", "1GB", "the emulated accelerator's", type=size)
    arguments.option("--memory", "1.6GB", "the memory cgroup", type=size)
    raise SystemExit(arguments.run(benchmark))
