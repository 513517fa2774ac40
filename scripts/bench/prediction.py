"""Predicted beside measured decoding speed over many configurations, and by how much the predictions are off.

    python scripts/bench/prediction.py --folder /data/prediction --trace gpt-oss-20b.mmlu.safetensors

Writes checkpoints of a few layers into the folder, records the routing of those that no trace is given for, measures
the machine, and then runs `offload bench` for each configuration, in a process of its own. What is there from a run
before is used again; `--measure` measures the machine again, which a prediction is only as good as. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench.common import BenchmarkError, note, run
from scripts.bench.families import FAMILIES
from scripts.bench.make_checkpoint import write_checkpoint

VOCAB = 32000
LAYERS = {"olmoe": 2, "qwen3-30b-a3b": 2, "gpt-oss-20b": 2}
LINKS = ("3GB/s", "1GB/s")


@dataclass(frozen=True)
class Configuration:
    """One run: a model, its flags, and the emulated accelerator's link, None for the CPU."""

    model: str
    link: str | None
    flags: str

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.model}, {'cpu' if self.link is None else self.link}, {self.flags}"


CONFIGURATIONS = tuple(
    Configuration(*each)
    for each in (
        ("demo", None, "--expert-cache 1G"),
        ("demo", None, "--expert-cache 40M"),
        ("demo", "3GB/s", "--expert-cache 40M"),
        ("olmoe", None, "--expert-cache 600M"),
        ("olmoe", None, "--expert-cache 200M --experts nf4"),
        ("olmoe", "3GB/s", "--expert-cache 600M"),
        ("olmoe", "1GB/s", "--expert-cache 900M"),
        ("qwen3-30b-a3b", None, "--expert-cache 800M"),
        ("qwen3-30b-a3b", None, "--expert-cache 900M --experts int8"),
        ("qwen3-30b-a3b", "3GB/s", "--expert-cache 800M --cpu-mem 2G"),
        ("qwen3-30b-a3b", "1GB/s", "--expert-cache 600M --experts int8"),
        ("gpt-oss-20b", None, "--expert-cache 1500M"),
        ("gpt-oss-20b", "3GB/s", "--expert-cache 1G"),
        ("gpt-oss-20b", "1GB/s", "--expert-cache 400M --experts nf4"),
    )
)


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
    layers = LAYERS[model]
    path = folder / f"{model}-{layers}l"
    if not path.exists():
        note(f"writing {path}")
        write_checkpoint(replace(FAMILIES[model], layers=layers, vocab=VOCAB, token_ids={}), path, progress=True)
    return path


def routing(model: str, path: Path, args: argparse.Namespace) -> Path:
    """Which trace a model's runs follow: for gpt-oss the one given, else what its own routers say of random text."""
    if model == "gpt-oss-20b" and args.trace is not None:
        return Path(args.trace)
    recorded: Path = args.folder / f"{model}.safetensors"
    if not recorded.exists():
        note(f"recording {recorded}")
        import torch

        from offload import OffloadedModel

        with OffloadedModel.from_pretrained(path, device="cpu", context=4096) as loaded:
            vocabulary = loaded.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(0)
            with loaded.record_trace(recorded, workload="random tokens", seed=0):
                for _ in range(args.repeat + 1):
                    ids = torch.randint(vocabulary, (1, args.prompt_tokens + args.tokens), generator=generator)
                    for start in range(0, ids.shape[1], loaded.plan.chunk):
                        loaded(ids[:, start : start + loaded.plan.chunk])
    return recorded


def machine(link: str, args: argparse.Namespace) -> Path:
    """The profile of this machine with an emulated link of that speed, measured if it is not there."""
    path: Path = args.folder / f"machine-{link.removesuffix('/s')}.json"
    if args.measure or not path.exists():
        note(f"measuring the machine, with a link of {link}")
        threads = [] if args.threads is None else ["--threads", args.threads]
        offload(
            "profile", "--device", "emulated", "--link", link, "--disk", args.folder, "--out", path, "--json", *threads
        )
    return path


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run every configuration, and compare."""
    args.folder.mkdir(parents=True, exist_ok=True)
    chosen = [each for each in CONFIGURATIONS if args.only in each.name]
    models = {each.model: checkpoint(each.model, args.folder) for each in chosen}
    traces = {model: routing(model, path, args) for model, path in models.items()}
    profiles = {link: machine(link, args) for link in sorted({each.link or LINKS[0] for each in chosen})}
    rows = []
    for each in chosen:
        device = ["cpu"] if each.link is None else ["emulated", "--link", each.link]
        threads = [] if args.threads is None else ["--threads", args.threads]
        said = offload(
            *("bench", models[each.model], "--device", *device, *each.flags.split(), *threads),
            *("--tokens", args.tokens, "--prompt-tokens", args.prompt_tokens, "--repeat", args.repeat),
            *("--trace", traces[each.model], "--profile", profiles[each.link or LINKS[0]]),
            *("--context", args.prompt_tokens + args.tokens, "--json"),
        )
        result = json.loads(said)
        if result["unpredicted"] is not None:
            raise BenchmarkError(f"{each.name}: {result['unpredicted']}")
        predicted, actual = result["predicted_decode_tokens_per_s"], result["decode_tokens_per_s"]
        error = predicted / actual - 1
        note(f"{each.name}: predicted {predicted:.2f}, measured {actual:.2f} tokens/s, {error:+.1%}")
        rows.append({"configuration": each.name, "error": error, **result})
    return {
        "benchmark": "prediction",
        "configurations": len(rows),
        "median_error": median(abs(row["error"]) for row in rows),
        "median_signed_error": median(row["error"] for row in rows),
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints, traces and profiles")
    parser.add_argument("--trace", help="a recorded trace of gpt-oss-20b's shape, for that model's runs")
    parser.add_argument("--measure", action="store_true", help="measure the machine again")
    parser.add_argument("--only", default="", metavar="TEXT", help="only configurations whose name has this in it")
    parser.add_argument("--threads", type=int, help="that compute on the CPU (default: the runtime's choice)")
    parser.add_argument("--tokens", type=int, default=48, help="of each reply (default 48)")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="default 16")
    parser.add_argument("--repeat", type=int, default=3, help="replies, after one that warms up (default 3)")
    return run(lambda: benchmark(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
