"""Reading prompts: streamed ahead against on demand, against what compute and the channel allow.

    python scripts/bench/make_checkpoint.py --like gpt-oss-20b --layers 4 --out /data/gpt-oss-4l
    python scripts/bench/prefill.py /data/gpt-oss-4l                                     # the CPU, experts on disk
    python scripts/bench/prefill.py /data/gpt-oss-4l --device emulated --link 2GB/s      # behind a link, experts in RAM

The ways to read prompts take turns in one process, each after an unmeasured chunk of its own. Prompts are fixed random
tokens, another one each time, read in chunks as `generate` does. The compute time is that of the same model with every
expert in place, in a process of its own. The limit is the longer of that and the bytes that were moved at the channel's
speed: the disk's, measured before each run, or the link's.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from offload.decide.prefill import PREFILLS
from scripts.bench.common import Args, Arguments, Result, ids_for, in_turn, medians, note, ratio, ratio_of, show, size
from scripts.bench.serve import Answer
from scripts.bench.storage import disk_bandwidth, drop_page_cache, shards, size_bytes
from scripts.bench.workers import Worker, engine_command

COLUMNS = ("tokens_per_s", "ratio", "share_of_limit", "stall_s", "later_hit_rate", "moved_bytes", "peak_bytes")


def benchmark(args: Args) -> Result:
    """Let the ways take turns, measure the compute time, and compare."""
    files = shards(args.checkpoint)
    prompts = {n: [ids_for(args.checkpoint, n, i + 1) for i in range(args.repetitions)] for n in args.prompts}
    with _worker(args, "offload") as offloaded:
        plan = offloaded.ask()["plan"]
        chunk = min(args.chunk or plan["chunk"], plan["chunk"])
        warm_up = ids_for(args.checkpoint, chunk, 0)
        note(f"chunks of {chunk} tokens")

        def window(reading: tuple[int, str], repetition: int) -> Result:
            tokens, way = reading
            offloaded.ask(use_prefill=way, ids=warm_up, prefill=True, chunk=chunk)
            drop_page_cache(files)
            disk = {"seed": repetition, "total_bytes": args.disk_bytes}
            speed = plan["link_bytes_per_s"] or disk_bandwidth(files, plan["slot_bytes"], **disk)
            answer = offloaded.ask(ids=prompts[tokens][repetition], prefill=True, chunk=chunk)
            return _figures(answer, args.device) | {"channel_bytes_per_s": speed}

        found = in_turn([(tokens, way) for tokens in prompts for way in args.ways], args.repetitions, window)
    rows = []
    with _worker(args, "resident") as resident:  # alone: it may not fit beside the others
        for tokens, own in prompts.items():
            answers = [resident.ask(ids=ids, prefill=True, chunk=chunk) for ids in (own[0], *own)]
            compute_s = median(answer["seconds"][0] for answer in answers[1:])
            last = found[tokens, args.ways[-1]]
            ways = {way: _summary(tokens, found[tokens, way], last, compute_s) for way in args.ways}
            rows.append({"tokens": tokens, "compute_s": compute_s, "ways": ways})
            show(ways, f"{tokens} tokens, {compute_s:.2f} s of compute", COLUMNS)
    return {"chunk": chunk, "expert_cache_bytes": plan["cache_bytes"], "rows": rows}


def _worker(args: Args, name: str) -> Worker:
    """The model with every expert in place, or within the budgets."""
    whole, resident = size_bytes(args.checkpoint), name == "resident"
    options: dict[str, Any] = {"device": args.device, "context": max(args.prompts) + 16}
    if args.device == "cpu":
        options["cpu_mem"] = whole + 4 * 10**9 if resident else args.cpu_mem
    else:
        options["gpu_mem"] = whole + 3 * 10**9 if resident else args.gpu_mem
        options["cpu_mem"] = whole + 4 * 10**9 + (0 if args.device == "cuda" else options["gpu_mem"])
        options["link"] = args.link
    return Worker(name, engine_command("offload", args.checkpoint, **options))


def _figures(answer: Answer, device: str) -> Result:
    """One reading's."""
    stats, kind, memory = answer["stats"], *(("cpu", "rss") if device == "cpu" else ("gpu", "gpu"))
    counted, first = stats["tiers"][kind], answer["first"]["tiers"][kind]
    late = {name: counted[name] - first[name] for name in ("hits", "late_hits", "misses")}
    return {
        "seconds": answer["seconds"][0],
        "stall_s": stats["stall_s"],
        "moved_bytes": counted["bytes_in"],
        "later_hit_rate": (late["hits"] + late["late_hits"]) / (sum(late.values()) or 1),
        "peak_bytes": stats[f"peak_{memory}_bytes"],
        "budget_bytes": stats[f"{kind}_mem_bytes"],
    }


def _summary(tokens: int, own: list[Result], last: list[Result], compute_s: float) -> Result:
    """Medians over the repetitions; ratios to the last way and shares of the limit are taken one by one."""
    seconds = [each["seconds"] for each in own]
    limits = [max(compute_s, each["moved_bytes"] / each["channel_bytes_per_s"]) for each in own]
    return medians(own) | {
        "peak_bytes": max(each["peak_bytes"] for each in own),
        "tokens_per_s": tokens / median(seconds),
        "ratio": ratio_of("seconds", last, own),
        "share_of_limit": ratio(limits, seconds),
        "all_seconds": seconds,
    }


if __name__ == "__main__":
    arguments = Arguments(__doc__, "checkpoint", repetitions=5, disk_bytes=1 << 29)
    arguments.option("--device", "cpu", "cpu, emulated or cuda")
    arguments.option("--cpu-mem", "3500M", "budget of the process, on the CPU", type=size)
    arguments.option("--gpu-mem", "3500M", "budget of an accelerator", type=size)
    arguments.option("--link", None, 'of the emulated device, such as "2GB/s"')
    arguments.option("--prompts", [512, 2048], "tokens each")
    arguments.option("--chunk", None, "at most so many tokens a pass, where more fit", type=int)
    arguments.option("--ways", PREFILLS, "in turn", choices=PREFILLS)
    raise SystemExit(arguments.run(benchmark))
