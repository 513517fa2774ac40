"""Command lines: the three that plan or load a model, with options that were given something at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from typer.main import get_command

from offload.terminal.app import app

_LOSSY = ("--experts", "--dense", "--activations", "--fallback", "--preset", "--dtype")
_LEFT_OUT = ("--debug", "--help-all", "--prompt", "--prompt-ids", "--json", "--stats", "--help", "--show-thinking")
_VALUES: Sequence[str] = (
    *("0", "-1", "1", "2", "64", "50", "1e9", str(10**18), "0.5", "nan", "inf", "-inf", "1e-40", "", " ", "x", "none"),
    *(
        "auto",
        "8G",
        "64M",
        "1",
        "25%",
        "100%",
        "0%",
        "-5G",
        "1e400",
        "0x10",
        "\u0661",
        "\x1b[31m",
        "/dev/null",
        "/dev/null/x",
    ),
    *("os:getcwd", "nope.nope:X", "lfu(reset=2)", "lru(", "1,2,3", "."),
)
_PROMPTS: Sequence[str] = (*["Hello", "What?", "é\u202e"] * 3, "\udcff", "a" * 700, "<|im_end|>", "<think>", " ")
_RIGHT: Mapping[str, Sequence[str]] = {
    "--device": ["cpu", "emulated", "cuda", "cuda:9", "mps"],
    "--gpu-mem": ["64M", "1G", "100K"],
    "--cpu-mem": ["2G", "1G", "200M"],
    "--expert-cache": ["10K", "0", "1M"],
    "--context": ["16", "200", "512", "100000"],
    "--policy": ["lru", "lfu", "lfru", "arc", "random", "fifo"],
    "--pool": ["layer", "global"],
    "--quota": ["even", "shallow", "dp", "distinct", "plec"],
    "--predictor": ["none", "cross-layer-gate", "frequency"],
    "--scheduler": ["gpu-only", "cpu-only", "auto", "hybrimoe"],
    "--prefill": ["streamed", "kept", "on-demand"],
    "--experts": ["auto", "bf16", "int8", "nf4", "int4", "auto,nf4", "int8>int4"],
    "--dense": ["auto", "int8", "nf4"],
    "--fallback": ["hobbit", "resident-low", "none"],
    "--dtype": ["float32", "bfloat16", "float16"],
    "--threads": ["1", "2"],
    "--link": ["3GB/s", "1e6"],
    "--temperature": ["0", "0.7", "1"],
    "--top-p": ["0.9"],
    "--seed": ["3"],
    "--max-new-tokens": ["1", "7", "400"],
}


@dataclass(frozen=True)
class Command:
    """`offload NAME FOLDER ...`: `words` is what follows the folder, and `lossy` whether the answer may be another."""

    name: str
    words: Sequence[str]
    lossy: bool

    def line(self, folder: Path) -> list[str]:
        """The words of the command line."""
        return [self.name, str(folder), *self.words]


def make_command(random: Random, mutated: int, name: str) -> Command:
    """A command line with `mutated` options changed."""
    words: list[str] = []
    lossy = False
    for parameter in random.sample(_options(name), mutated):
        flag = parameter.opts[0]
        lossy |= flag in _LOSSY
        words.append(flag)
        if not parameter.is_flag:
            right = random.random() < 0.7 and flag in _RIGHT
            words.append(random.choice(_RIGHT[flag] if right else _VALUES))
    if name == "generate":
        words += _prompt(random)
    elif name == "chat":
        words += ["--prompt", random.choice(_PROMPTS)]
    if name != "plan" and "--max-new-tokens" not in words and random.random() < 0.5:
        words += ["--max-new-tokens", "5"]
    if name != "plan" and "--seed" not in words:
        words += ["--seed", "7"]
    if "--exact" not in words:  # the plain model's bits are what answers are compared with
        words += ["--exact"]
    return Command(name, [*words, "--json"], lossy)


def _prompt(random: Random) -> list[str]:
    if random.random() < 0.3:
        return ["--prompt", random.choice(["Hello", "", "é", "\x00"])]
    ids = [random.randrange(256) for _ in range(random.choice([1, 3, 20]))]
    if random.random() < 0.05:
        ids.append(random.choice([-1, 260, 10**9]))
    return ["--prompt-ids", ",".join(map(str, ids))]


def _options(name: str) -> list[Any]:
    group: Any = get_command(app)
    found = [each for each in group.commands[name].params if each.opts[0].startswith("--")]
    return [each for each in found if each.opts[0] not in _LEFT_OUT]
