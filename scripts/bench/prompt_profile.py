"""Where the time of a long prompt goes: py-spy's samples, counted to experts, attention, reading and the rest.

    python scripts/bench/make_checkpoint.py --like qwen3-30b-a3b --layers 4 --out /data/qwen3-4l
    pip install py-spy
    python scripts/bench/prompt_profile.py /data/qwen3-4l --experts nf4 --dense nf4
    python scripts/bench/prompt_profile.py /data/qwen3-4l --cpu-mem 3G --against before

The prompt is read once to fill the caches, then timed, then sampled. Shares are of the thread that reads the prompt;
"beside it" are those of the threads that read weights, in the same time. What works below both, such as OpenMP's
threads and the kernels' own, is not sampled: it does what the thread that started it does. `--against FOLDER` samples
another checkout of this project, too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from scripts.bench.common import Args, Arguments, BenchmarkError, Result, ids_for, note, show, size
from scripts.bench.stacks import PARTS, Profile, profile
from scripts.bench.workers import Worker, engine_command

QUICK = {"prompt": 256, "repetitions": 1}
READING = "prefill"
"""The function of scripts/bench/engines.py that reads a prompt."""


def benchmark(args: Args) -> Result:
    """The parts and functions of this checkout, and of the other one."""
    spy = _py_spy(args.py_spy)
    checkouts = {"now": None} | ({"before": args.against} if args.against else {})
    found: dict[str, Result] = {}
    with TemporaryDirectory(prefix="offload-profile-") as folder:
        for name, checkout in checkouts.items():
            sampled, seconds = _sampled(spy, args, checkout, Path(folder, name))
            found[name] = _figures(sampled, seconds, args)
    shares = found["now"]["parts"]
    rows: dict[str, dict[str, Any]] = {part: {} for part in sorted(shares, key=shares.__getitem__, reverse=True)}
    for name, figures in found.items():
        for part, row in rows.items():
            share, beside = figures["parts"][part], figures["beside"][part]
            row |= {f"% {name}": 100 * share, f"% beside it, {name}": 100 * beside}
    show({part: row for part, row in rows.items() if any(row.values())}, f"a prompt of {args.prompt} tokens")
    for name, figures in found.items():
        top = figures["functions"].items()
        rows = {function: {"%": 100 * row["share"], "part": row["part"]} for function, row in top}
        show(rows, f"{name}: {figures['tokens_per_s']:.1f} tokens/s, {figures['samples']} samples; top functions")
    return found["now"] | {"before": found.get("before")}


def _sampled(spy: str, args: Args, checkout: Path | None, folder: Path) -> tuple[Profile, list[float]]:
    """What py-spy found, and the seconds of readings without it."""
    folder.mkdir()
    options: dict[str, Any] = {"device": "cpu", "cpu_mem": args.cpu_mem, "context": args.prompt + 16}
    options |= {"experts": args.experts, "dense": args.dense, "threads": args.threads}
    if args.experts != "auto":
        options["expert_store"] = folder / "experts"
    prompts = [ids_for(args.checkpoint, args.prompt, seed) for seed in range(args.repetitions + 1)]
    stacks = folder / "stacks"
    with Worker("offload", engine_command("offload", args.checkpoint, checkout=checkout, **options)) as worker:
        worker.ask(ids=prompts[0], prefill=True)
        seconds = [worker.ask(ids=ids, prefill=True)["seconds"][0] for ids in prompts[1:]]
        with _spying(spy, worker.pid, args.rate, stacks):
            for ids in prompts[1:]:
                worker.ask(ids=ids, prefill=True)
    with stacks.open(encoding="utf-8", errors="replace") as lines:
        return profile(lines, READING), seconds


def _py_spy(name: str) -> str:
    """The program, on PATH or beside this interpreter. Raises BenchmarkError, saying what to install."""
    beside = str(Path(sys.executable).parent)
    if found := shutil.which(name) or shutil.which(name, path=beside):
        return found
    raise BenchmarkError(f"there is no {name}: pip install py-spy, or say where it is with --py-spy")


@contextmanager
def _spying(spy: str, pid: int, rate: int, out: Path) -> Iterator[None]:
    """Sample a process while the block runs; `out` has the stacks afterwards. Raises BenchmarkError if it may not."""
    command = [spy, "record", "--pid", str(pid), "--rate", str(rate), "--format", "raw", "--output", str(out)]
    command += ["--native", "--idle", "--threads", "--full-filenames"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    with process:
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if "Sampling process" in line:
                break
        else:
            raise BenchmarkError(f"{spy} cannot attach: {' '.join(filter(None, said)) or 'no message'}")
        note(said[-1].rpartition("> ")[2].partition(".")[0])
        try:
            yield
        finally:
            os.kill(process.pid, signal.SIGINT)
            rest, _ = process.communicate()
    if not out.exists():
        raise BenchmarkError(f"{spy} wrote no stacks: {rest.strip()}")


def _figures(found: Profile, seconds: list[float], args: Args) -> Result:
    """Shares of the time of the thread that reads the prompt."""
    if not found.samples:
        raise BenchmarkError("the prompt was read before py-spy took a sample: a longer --prompt or a higher --rate")
    top = found.functions.most_common(args.top)
    return {
        "tokens_per_s": args.prompt / median(seconds),
        "samples": found.samples,
        "parts": {part: found.parts[part] / found.samples for part in PARTS},
        "beside": {part: found.beside[part] / found.samples for part in PARTS},
        "functions": {name: {"share": n / found.samples, "part": found.part_of[name]} for name, n in top},
    }


if __name__ == "__main__":
    arguments = Arguments(__doc__, "checkpoint", quick=QUICK, prompt=2048, repetitions=2, threads=None)
    arguments.option("--experts", "auto", "what experts are stored and computed at")
    arguments.option("--dense", "auto", "what linear layers of no expert are stored and computed at")
    arguments.option("--cpu-mem", None, "budget of the process, instead of most of what is free", type=size)
    arguments.option("--rate", 50, "samples a second")
    arguments.option("--top", 15, "functions to show")
    arguments.option("--py-spy", "py-spy", "the program")
    arguments.option("--against", None, "another checkout, to compare with", type=Path)
    raise SystemExit(arguments.run(benchmark))
