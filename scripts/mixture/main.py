"""Train a small Mixture of Experts from scratch on freely licensed text, and a dense model of equal compute beside it.

    python scripts/mixture/main.py WORK [--tokens N] [--workers N] [--rate R] [--balance B] [--seed 0]

What is made goes to the folder WORK: the packages and their text, the tokenizer, both runs, and of the mixture
a checkpoint as trained, an int8 file, the checkpoint which that makes, and a trace of its routing. Ctrl-C saves, and
the same command goes on where it was. Text comes from Debian's packages, with apt-get and dpkg-deb, and from PyPI's.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from offload.demo.int8 import pack, unpack, write_checkpoint
from scripts.mixture import text, tokens
from scripts.mixture.score import held_out_losses, perplexities, table, text_table
from scripts.mixture.shape import Shape
from scripts.mixture.sources import SOURCES
from scripts.mixture.trace import record, stretches
from scripts.mixture.train import Settings, train


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK", help="folder for all that is made")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="that each model is trained on")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread")
    parser.add_argument("--rate", type=float, default=Settings.rate, help="peak learning rate")
    parser.add_argument("--balance", type=float, default=Shape.balance, help="weight of the load-balancing loss")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="between two saves")
    parser.add_argument("--trace-tokens", type=int, default=1680, help="in sequences of --trace-length")
    parser.add_argument("--trace-length", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def export(model: Any, work: Path, options: argparse.Namespace, held: dict[str, tokens.Tokens]) -> dict[str, int]:
    """Write checkpoints, int8 file and trace of the mixture; returns the bytes of the last two."""
    tokenizer = work / tokens.TOKENIZER
    write_checkpoint(model, tokenizer.read_text(encoding="utf-8"), work / "trained")
    packed = work / "mixture-int8.safetensors"
    size = pack(model, tokenizer, packed)
    unpack(packed, work / "checkpoint")
    quotable = {source.name for source in SOURCES if source.quotable}
    texts = {name: text for name, text in held.items() if name in quotable}
    sequences = stretches(texts, options.trace_tokens, options.trace_length)
    trace = record(work / "checkpoint", sequences, work / "mixture-trace.safetensors", "held-out text")
    return {"int8_bytes": size, "trace_bytes": trace}


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # training uses processes instead
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    texts = text.prepare(work)
    print(text_table(texts))
    _, train_tokens, held = tokens.prepare(work, texts)
    held_tokens = sum(map(len, held.values()))
    print(f"{len(train_tokens)} tokens to train on, {held_tokens} held out")
    settings = Settings(tokens=options.tokens, rate=options.rate, seed=options.seed)
    found: dict[str, dict[str, float]] = {}
    sizes: dict[str, int] = {}
    shapes = {"mixture": Shape(balance=options.balance), "dense": Shape(experts=0)}
    for name, shape in shapes.items():
        every, active = shape.parameters()
        print(f"{name}: {every} parameters, {active} active", flush=True)
        path = work / f"{name}-run.safetensors"
        model = train(
            shape, settings, train_tokens, path,
            title=name, workers=options.workers, save_minutes=options.save_minutes,
        )  # fmt: skip
        found[name] = perplexities(texts, held_out_losses(model, held, settings.length))
        if name == "mixture":
            sizes = export(model, work, options, held)
            model = unpacked(work / "checkpoint")
            found["mixture, int8"] = perplexities(texts, held_out_losses(model, held, settings.length))
    print(table(found))
    print(json.dumps({"perplexity": found, **sizes, "train_tokens": settings.tokens, "seed": settings.seed}))


def unpacked(checkpoint: Path) -> Any:
    """The stock model of a checkpoint, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on") from None
