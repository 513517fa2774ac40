"""Carve SmolLM2-135M-Instruct into a Mixture of Experts and distil it: offload/demo/demo-carve.safetensors.

    python scripts/carve/main.py --text FOLDER [--minutes 45] [--router-scale S] [--seed 0] [--out FILE]
        [--resume [FILE]] [--checkpoint FOLDER]

FOLDER holds .jsonl files with a "prompt" per line and .txt or .rst files; 12 % of each is held out for
the perplexities that are printed. docs/demo.md tells how it works.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offload.demo.build import DATA_FILE, write_checkpoint
from offload.demo.carve import Carve
from offload.demo.weights import open_dense
from offload.system.paths import cache_dir
from scripts.carve.assign import carve, refit_down, refit_gates
from scripts.carve.export import load_corrections, save_carve
from scripts.carve.student import Shape
from scripts.carve.student import build as build_student
from scripts.carve.text import Texts
from scripts.carve.text import build as build_texts
from scripts.carve.train import Trainer, gate_weights, perplexity

Carves = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each layer, which neurons are whose, and the router."""


def load_teacher(work: Path) -> tuple[Any, Any]:
    """(teacher in bfloat16, tokenizer), from the same dense weights as the packaged demo's."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory(dir=work) as folder:
        dense = open_dense(Path(folder))
        config = LlamaConfig(**dense.config(), attn_implementation="eager")  # its backward is fast on a CPU
        teacher = LlamaForCausalLM(config)
        state = {n: torch.from_numpy(dense.tensor(n)) for n, _ in teacher.named_parameters()}
        teacher.load_state_dict(state, strict=False)
        dense.save_tokenizer(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return teacher.to(torch.bfloat16).eval().requires_grad_(False), tokenizer


def report(name: str, model: Any, held_out: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Print and return the perplexity of every held-out set."""
    found = {part: round(perplexity(model, documents), 3) for part, documents in held_out.items()}
    print(f"perplexity, {name}: " + ", ".join(f"{part} {value}" for part, value in found.items()), flush=True)
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of .jsonl prompts and plain text")
    parser.add_argument("--out", type=Path, default=DATA_FILE)
    parser.add_argument("--work", type=Path, default=cache_dir() / "carve-work", help="keeps sampled text between runs")
    parser.add_argument("--minutes", type=float, default=45.0, help="wall clock of the distillation")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument(
        "--router-scale", type=float, metavar="S",
        help=f"1 or 2 makes gates uneven; default: as --resume's file, else {Shape.router_scale}",
    )  # fmt: skip
    parser.add_argument("--dreams", type=int, default=96, help="conversations the teacher makes up")
    parser.add_argument("--per-file", type=int, default=60, help="stretches taken from each plain-text file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", type=Path, nargs="?", const=DATA_FILE, metavar="FILE",
        help="go on from a carve file, by default the packaged demo's",
    )  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="also write the checkpoint it makes")
    return parser.parse_args()


def carved(teacher: Any, texts: Texts, shape: Shape, options: argparse.Namespace) -> tuple[Any, Carves]:
    """(a new student, stored in --out as it is; its experts), cut out of the teacher by what its neurons say."""
    mixed = texts.train[:: max(1, len(texts.train) // 90)]
    inputs, carves = carve(teacher, mixed, shape, options.seed)
    student = build_student(teacher, carves, shape)
    for layer, dense, x in zip(student.model.layers, teacher.model.layers, inputs, strict=True):
        refit_down(layer.mlp, dense.mlp, x)
    save_carve(student, shape, options.out)
    return student, carves


def resumed(teacher: Any, texts: Texts, shape: Shape, old: Carve) -> Any:
    """The student of a carve file, its gates fitted again where the router's scale is another."""
    carves = [(old.order(i), old.tensors["router"][i].float()) for i in range(len(teacher.model.layers))]
    student = build_student(teacher, carves, replace(shape, router_scale=old.router_scale))
    load_corrections(student, old)
    if shape.router_scale != old.router_scale:
        refit_gates(student, texts.train[:: max(1, len(texts.train) // 20)], shape)
    return student


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # more stall each other when other programs run; training uses processes instead
    options.work.mkdir(parents=True, exist_ok=True)
    old = Carve(options.resume) if options.resume else None
    shape = Shape(router_scale=options.router_scale or (old.router_scale if old else Shape.router_scale))
    teacher, tokenizer = load_teacher(options.work)
    texts = build_texts(
        options.text, options.work, teacher, tokenizer,
        seed=options.seed, dreams=options.dreams, per_file=options.per_file,
    )  # fmt: skip
    tokens = sum(map(len, texts.train))
    print(f"{tokens} training tokens in {len(texts.train)} documents", flush=True)
    carves: Carves | None = None
    if old:
        student = resumed(teacher, texts, shape, old)
    else:
        student, carves = carved(teacher, texts, shape, options)
    if options.minutes > 0:
        trainer = Trainer(teacher, student, texts.train, options.rate, options.seed)
        trainer.run(options.minutes, options.workers, lambda: print("saved", save_carve(student, shape, options.out)))
    elif old and options.out != options.resume:
        save_carve(student, shape, options.out)
    load_corrections(student, Carve(options.out))  # as quantised
    figures = {
        "distilled": report("distilled", student, texts.held_out),
        "dense": report("dense", teacher, texts.held_out),
    }
    if carves is not None:
        figures["carved"] = report("carved only", build_student(teacher, carves, shape), texts.held_out)
    gates = [round(weight, 4) for weight in gate_weights(student, texts.held_out["chat"][:8])]
    print(f"gate weights, the heaviest first: {gates}")
    if options.checkpoint:
        options.checkpoint.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.work) as unpacked:
            write_checkpoint(open_dense(Path(unpacked)), Carve(options.out), options.checkpoint)
    said = {"perplexity": figures, "gates": gates, "train_tokens": tokens, "seed": options.seed, "time": time.time()}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
