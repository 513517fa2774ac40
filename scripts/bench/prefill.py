"""Reading prompts: streamed ahead against on demand, against what compute and the channel allow.

    python scripts/bench/make_checkpoint.py --like gpt-oss-20b --layers 4 --out /data/gpt-oss-4l
    python scripts/bench/prefill.py /data/gpt-oss-4l                                     # the CPU, experts on disk
    python scripts/bench/prefill.py /data/gpt-oss-4l --device emulated --link 2GB/s      # behind a link, experts in RAM

The ways to read prompts take turns in one process, each after an unmeasured chunk of its own. Prompts are fixed random
tokens, another one each time, read in chunks as `generate` does; the model's own gates route. The compute time is that
of the same model with every expert in place, in a process of its own. The limit is the longer of that and the bytes
that were moved at the channel's speed: the disk's, measured before each run, or the link's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from offload.decide.prefill import PREFILLS
from offload.system.sizes import format_bytes, parse_bytes
from scripts.bench.common import (
    Answer,
    Request,
    Worker,
    disk_bandwidth,
    drop_page_cache,
    note,
    random_ids,
    run,
    serve,
    shards,
    worker_command,
)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the compute time, let the ways take turns, and compare."""
    files = shards(args.checkpoint)
    vocab = json.loads((args.checkpoint / "config.json").read_text())["vocab_size"]
    warm_up = random_ids(max(args.prompts), vocab, args.seed)
    prompts = {
        tokens: [random_ids(tokens, vocab, args.seed + n + 1) for n in range(args.repetitions)]
        for tokens in args.prompts
    }

    def worker(name: str) -> Worker:
        note(f"loading {name}")
        return Worker(name, worker_command(__file__, args.argv, "--worker", name))

    result: dict[str, Any] = {"benchmark": "prefill", "checkpoint": args.checkpoint.name, "device": args.device}
    rows = []
    with worker("offload") as offloaded:
        plan = offloaded.ask()
        chunk = min(args.chunk or plan["chunk"], plan["chunk"])
        result |= plan | {"chunk": chunk}
        note(f"chunks of {chunk} tokens, {format_bytes(plan['expert_cache_bytes'])} of expert cache")
        for tokens, each in prompts.items():
            found: dict[str, list[Answer]] = {name: [] for name in args.ways}
            for repetition, ids in enumerate(each):
                for name in args.ways if repetition % 2 == 0 else args.ways[::-1]:
                    offloaded.ask(prefill=name, ids=warm_up[:chunk], chunk=chunk)
                    drop_page_cache(files)
                    speed = plan["link_bytes_per_s"] or disk_bandwidth(
                        files, plan["slot_bytes"], seed=repetition, total_bytes=args.disk_bytes
                    )
                    answer = offloaded.ask(ids=ids, chunk=chunk) | {"channel_bytes_per_s": speed}
                    found[name].append(answer)
                    note(
                        f"{tokens} tokens, {name}: {tokens / answer['seconds']:.1f} tokens/s, "
                        f"stall {answer['stall_s']:.2f} s of {answer['seconds']:.2f}"
                    )
            rows.append((tokens, found))
    with worker("resident") as resident:  # alone: it may not fit beside the others
        compute = {
            tokens: median([resident.ask(ids=ids, chunk=chunk)["seconds"] for ids in (each[0], *each)][1:])
            for tokens, each in prompts.items()
        }
    result["rows"] = [summary(tokens, found, compute[tokens]) for tokens, found in rows]
    for row in result["rows"]:
        note(f"{row['tokens']} tokens, {row['compute_s']:.2f} s of compute:")
        for name, way in row["ways"].items():
            note(
                f"  {name:9} {way['tokens_per_s']:7.1f} tokens/s, {way['ratio']:.2f} of {args.ways[-1]}, "
                f"{way['share_of_limit']:.0%} of the limit, hits of later chunks {way['later_hit_rate']:.0%}, "
                f"{format_bytes(int(way['moved_bytes']))} moved, peak {format_bytes(way['peak_bytes'])} "
                f"of {format_bytes(way['budget_bytes'])}"
            )
    return result


def summary(tokens: int, found: dict[str, list[Answer]], compute_s: float) -> dict[str, Any]:
    """Medians over the repetitions; ratios to the last way and shares of the limit are taken one by one."""
    ways = {}
    for name, answers in found.items():
        base = list(found.values())[-1]
        ways[name] = {
            **{key: median(answer[key] for answer in answers) for key in answers[0] if key != "peak_bytes"},
            "peak_bytes": max(answer["peak_bytes"] for answer in answers),
            "tokens_per_s": median(tokens / answer["seconds"] for answer in answers),
            "ratio": median(b["seconds"] / a["seconds"] for a, b in zip(answers, base, strict=True)),
            "share_of_limit": median(
                max(compute_s, a["moved_bytes"] / a["channel_bytes_per_s"]) / a["seconds"] for a in answers
            ),
            "all_seconds": [answer["seconds"] for answer in answers],
        }
    return {"tokens": tokens, "compute_s": compute_s, "ways": ways}


def engine(args: argparse.Namespace) -> Callable[[Request], Answer]:
    """Load the worker's model and answer: {"ids", "chunk"} with what reading them took, {} with its plan.

    {"prefill"} changes the way first.
    """
    import torch
    from transformers import DynamicCache

    from offload.model import OffloadedModel
    from offload.system import memory

    whole = sum(path.stat().st_size for path in shards(args.checkpoint))
    resident = args.worker == "resident"
    sizes: dict[str, Any] = {"device": args.device, "context": max(args.prompts) + 16, "threads": args.threads}
    if args.device == "cpu":
        sizes["cpu_mem"] = whole + 4 * 10**9 if resident else args.cpu_mem
    else:
        gpu_mem = parse_bytes(args.gpu_mem, "--gpu-mem")
        sizes |= {"gpu_mem": whole + 3 * 10**9 if resident else gpu_mem, "link": args.link}
        sizes["cpu_mem"] = whole + 4 * 10**9 + (0 if args.device == "cuda" else sizes["gpu_mem"])
    model = OffloadedModel.from_pretrained(args.checkpoint, **{k: v for k, v in sizes.items() if v is not None})

    def counts() -> tuple[int, int]:
        stats = model.stats
        counted = stats.tiers[stats.computing].counts
        return counted.hits + counted.late_hits, counted.accesses

    def handle(request: Request) -> Answer:
        if "prefill" in request:
            model.use_prefill(request["prefill"])
        if "ids" not in request:
            return {
                "chunk": model.plan.chunk,
                "slot_bytes": model.plan.slot_bytes,
                "expert_cache_bytes": model.stats.tiers[model.stats.computing].capacity_bytes,
                "link_bytes_per_s": getattr(model.parts.device, "link_bytes_per_s", None),
            }
        model.reset_stats()
        cache = DynamicCache(config=model.config)
        chunks = torch.tensor([request["ids"]], device=model.device).split(request["chunk"], dim=1)
        first = 0, 0
        began = time.perf_counter()
        for index, ids in enumerate(chunks):
            output = model.forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if index == 0:
                first = counts()
        output.logits.cpu()
        seconds = time.perf_counter() - began
        stats = model.stats
        hits, accesses = (now - before for now, before in zip(counts(), first, strict=True))
        counted = stats.tiers[stats.computing].counts
        peak, budget = (
            (stats.peak_rss_bytes, stats.cpu_mem_bytes)
            if args.device == "cpu"
            else (stats.peak_gpu_bytes, stats.gpu_mem_bytes)
        )
        return {
            "seconds": seconds,
            "stall_s": stats.stall_s,
            "moved_bytes": counted.bytes_in,
            "later_hit_rate": hits / accesses if accesses else 0.0,
            "prefetches": counted.prefetches,
            "wasted_prefetches": counted.wasted_prefetches,
            "peak_bytes": peak,
            "budget_bytes": budget,
            "rss_bytes": memory.peak_resident_bytes(),
        }

    return handle


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a folder that scripts/bench/make_checkpoint.py wrote")
    parser.add_argument("--device", default="cpu", help="cpu (default), emulated or cuda")
    parser.add_argument("--cpu-mem", default="3500M", help="budget of the process, on the CPU (default 3500M)")
    parser.add_argument("--gpu-mem", default="3500M", help="budget of an accelerator (default 3500M)")
    parser.add_argument("--link", help='of the emulated device, such as "2GB/s"')
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048], help="tokens each (default 512 2048)")
    parser.add_argument("--chunk", type=int, help="at most so many tokens a pass (default: what fits)")
    parser.add_argument("--ways", nargs="+", choices=PREFILLS, default=list(PREFILLS), help="default: all, in turn")
    parser.add_argument("--repetitions", type=int, default=5, help="measured runs of each (default 5)")
    parser.add_argument("--threads", type=int, help="CPU threads that compute (default: the model's choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens (default 0)")
    parser.add_argument("--disk-bytes", type=int, default=1 << 29, help="read to time the disk (default 2^29)")
    parser.add_argument("--worker", choices=("offload", "resident"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.worker:
        return serve(lambda: engine(args))
    return run(lambda: benchmark(args))


if __name__ == "__main__":
    sys.exit(main())
