"""Predicted beside measured decoding speed over many configurations, and by how much the predictions are off.

    python scripts/bench/prediction.py --folder /data/prediction --trace gpt-oss-20b.mmlu.safetensors

Writes checkpoints of a few layers into the folder, records the routing of those that no trace is given for, measures
the machine, and then runs `offload bench` for each configuration, in a process of its own. What is there from a run
before is used again; `--measure` measures the machine again, which a prediction is only as good as.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

from scripts.bench.common import Args, Arguments, BenchmarkError, Result, ids_for, note, show
from scripts.bench.engines import load, prefill
from scripts.bench.families import FAMILIES
from scripts.bench.make_checkpoint import write_checkpoint

VOCAB, LAYERS = 32000, 2
CPU = "cpu"
CONFIGURATIONS = (  # a model, the speed of the emulated accelerator's link, and flags
    ("demo", CPU, "--expert-cache 1G"),
    ("demo", CPU, "--expert-cache 40M"),
    ("demo", "3GB/s", "--expert-cache 40M"),
    ("olmoe", CPU, "--expert-cache 600M"),
    ("olmoe", CPU, "--expert-cache 200M --experts nf4"),
    ("olmoe", "3GB/s", "--expert-cache 600M"),
    ("olmoe", "1GB/s", "--expert-cache 900M"),
    ("qwen3-30b-a3b", CPU, "--expert-cache 800M"),
    ("qwen3-30b-a3b", CPU, "--expert-cache 900M --experts int8"),
    ("qwen3-30b-a3b", "3GB/s", "--expert-cache 800M --cpu-mem 2G"),
    ("qwen3-30b-a3b", "1GB/s", "--expert-cache 600M --experts int8"),
    ("gpt-oss-20b", CPU, "--expert-cache 1500M"),
    ("gpt-oss-20b", "3GB/s", "--expert-cache 1G"),
    ("gpt-oss-20b", "1GB/s", "--expert-cache 400M --experts nf4"),
)


def benchmark(args: Args) -> Result:
    """Run every configuration, and compare."""
    args.folder.mkdir(parents=True, exist_ok=True)
    chosen = {", ".join(each): each for each in CONFIGURATIONS if args.only in ", ".join(each)}
    models = {model: checkpoint(model, args.folder) for model, _, _ in chosen.values()}
    traces = {model: routing(model, path, args) for model, path in models.items()}
    links = {link: "3GB/s" if link == CPU else link for _, link, _ in chosen.values()}
    profiles = {link: machine(link, args) for link in sorted(set(links.values()))}
    sizes = {"tokens": args.tokens, "prompt-tokens": args.prompt, "repeat": args.repetitions}
    sizes["context"] = args.prompt + args.tokens
    length = [f"--{name}={value}" for name, value in sizes.items()]
    rows: dict[str, Result] = {}
    for name, (model, link, flags) in chosen.items():
        device = ("cpu",) if link == CPU else ("emulated", "--link", link)
        known = ("--trace", traces[model], "--machine", profiles[links[link]])
        line = offload("bench", models[model], "--device", *device, *flags.split(), *known, *length, "--json")
        said = json.loads(line)
        if said["unpredicted"] is not None:
            raise BenchmarkError(f"{name}: {said['unpredicted']}")
        predicted, measured = said["predicted_decode_tokens_per_s"], said["decode_tokens_per_s"]
        rows[name] = {"predicted": predicted, "measured": measured, "error": predicted / measured - 1, "said": said}
        note(f"{name}: {rows[name]['error']:+.1%}")
    show(rows, columns=("predicted", "measured", "error"))
    errors = [row["error"] for row in rows.values()]
    return {"median_error": median(map(abs, errors)), "median_signed_error": median(errors), "rows": rows}


def offload(*arguments: object) -> str:
    """What the `offload` program prints. Raises BenchmarkError where it fails; its message is above."""
    command = [sys.executable, "-m", "offload", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command[2:])} failed: its own message is above")
    return done.stdout


def checkpoint(model: str, folder: Path) -> Path:
    """The model's checkpoint, written if it is not there."""
    if model == "demo":
        return Path(offload("demo").strip())
    path = folder / f"{model}-{LAYERS}l"
    if not path.exists():
        note(f"writing {path}")
        write_checkpoint(replace(FAMILIES[model], layers=LAYERS, vocab=VOCAB, token_ids={}), path, progress=True)
    return path


def routing(model: str, path: Path, args: Args) -> Path:
    """Which trace a model's runs follow: for gpt-oss the one given, else what its own routers say of random text."""
    if model == "gpt-oss-20b" and args.trace is not None:
        return Path(args.trace)
    recorded: Path = args.folder / f"{model}.safetensors"
    if not recorded.exists():
        note(f"recording {recorded}")
        with (
            closing(load("offload", path, device="cpu", context=4096)) as engine,
            engine.model.record_trace(recorded, workload="random tokens", seed=0),
        ):
            for seed in range(args.repetitions + 1):
                prefill(engine, ids_for(path, args.prompt + args.tokens, seed))
    return recorded


def machine(link: str, args: Args) -> Path:
    """The profile of this machine with an emulated link of that speed, measured if it is not there."""
    path: Path = args.folder / f"machine-{link.removesuffix('/s')}.json"
    if args.measure or not path.exists():
        note(f"measuring the machine, with a link of {link}")
        offload("profile", "--device", "emulated", "--link", link, "--disk", args.folder, "--out", path, "--json")
    return path


if __name__ == "__main__":
    arguments = Arguments(__doc__, tokens=48, prompt=16, repetitions=3)
    arguments.option("--folder", None, "for checkpoints, traces and profiles", type=Path, required=True)
    arguments.option("--trace", None, "a recorded trace of gpt-oss-20b's shape, for that model's runs", type=Path)
    arguments.option("--measure", False, "measure the machine again")
    arguments.option("--only", "", "only configurations whose name has this in it", metavar="TEXT")
    raise SystemExit(arguments.run(benchmark))
