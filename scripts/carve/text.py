"""Training and held-out text: a folder of files, and what the dense teacher itself says when asked."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HELD_OUT = 0.12  # share of every file that training never sees
DOCUMENT_CHARS = 1500
MAX_TOKENS = 384
PROMPT_TOKENS = 224
REPLY_TOKENS = 96
DREAM_TOKENS = 200
HELD_OUT_PIECES = 10  # stretches of each plain-text file that perplexity is measured on


@dataclass
class Texts:
    """Token ids, one 1-D int64 tensor a document; `held_out` by "prompts", "chat" or a text file's stem."""

    train: list[torch.Tensor] = field(default_factory=list)
    held_out: dict[str, list[torch.Tensor]] = field(default_factory=dict)


def read_folder(folder: Path, seed: int) -> tuple[list[str], list[str], dict[str, tuple[str, str]]]:
    """(training prompts, held-out prompts, {stem: (training, held-out text)}) of every file below `folder`.

    A .jsonl file gives its objects' "prompt" and loses a seeded 12 % to the held-out side; a .txt or .rst
    file is plain text and loses its last 12 %.
    """
    prompts: list[str] = []
    held: list[str] = []
    plain: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            found = [json.loads(line)["prompt"] for line in lines if line.strip()]
            random.Random(seed).shuffle(found)
            cut = math.ceil(len(found) * HELD_OUT)
            held += found[:cut]
            prompts += found[cut:]
        elif path.suffix in {".txt", ".rst"}:
            text = path.read_text(encoding="utf-8", errors="replace")
            cut = int(len(text) * (1 - HELD_OUT))
            plain[path.stem] = (text[:cut], text[cut:])
    if not prompts and not plain:
        raise SystemExit(f"{folder} holds no .jsonl with prompts and no .txt or .rst text")
    return prompts, held, plain


def pieces(text: str, count: int, seed: int) -> list[str]:
    """At most `count` different stretches of DOCUMENT_CHARS characters, in a seeded order."""
    starts = list(range(0, max(1, len(text) - DOCUMENT_CHARS + 1), DOCUMENT_CHARS))
    random.Random(seed).shuffle(starts)
    return [text[start : start + DOCUMENT_CHARS] for start in starts[:count]]


def as_prompt(tokenizer: Any, prompt: str, *, reply_follows: bool) -> list[int]:
    """Token ids of one user turn in the model's chat template, with or without the reply's opening."""
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=reply_follows)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.no_grad()
def replies(teacher: Any, starts: list[list[int]], *, tokens: int, stop: int | None, seed: int) -> list[list[int]]:
    """Each start continued by `tokens` sampled tokens, or up to and including `stop`."""
    torch.manual_seed(seed)
    pad = teacher.config.pad_token_id
    began = time.time()
    order = sorted(range(len(starts)), key=lambda i: len(starts[i]))
    out: dict[int, list[int]] = {}
    for first in range(0, len(order), 48):
        rows = order[first : first + 48]
        width = max(len(starts[i]) for i in rows)
        ids = torch.tensor([[pad] * (width - len(starts[i])) + starts[i] for i in rows])
        mask = torch.tensor([[0] * (width - len(starts[i])) + [1] * len(starts[i]) for i in rows])
        said = teacher.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, eos_token_id=stop, pad_token_id=pad,
            do_sample=True, temperature=0.8, top_k=0,
        )[:, width:].tolist()  # fmt: skip
        for i, new in zip(rows, said, strict=True):
            end = new.index(stop) + 1 if stop in new else len(new)
            out[i] = starts[i] + new[:end]
        print(f"sampled {len(out)}/{len(starts)} texts, {time.time() - began:.0f} s", flush=True)
    return [out[i] for i in range(len(starts))]


def build(folder: Path, work: Path, teacher: Any, tokenizer: Any, *, seed: int, dreams: int, per_file: int) -> Texts:
    """The texts of `folder` plus sampled ones; the samples are kept in `work` for the next run.

    The teacher answers every prompt once, and "dreams" `dreams` conversations of its own, prompt and all: the
    chat template's system turn and an opened user turn are its only start.
    """
    prompts, held, plain = read_folder(folder, seed)
    kept = work / f"sampled-{seed}-{len(prompts)}-{len(held)}-{dreams}.json"
    if kept.exists():
        sampled = json.loads(kept.read_text())
    else:
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        asked = [as_prompt(tokenizer, p, reply_follows=True)[:224] for p in prompts + held]
        opened = as_prompt(tokenizer, "\0", reply_follows=False)
        opened = opened[: opened.index(tokenizer("\0")["input_ids"][0])]
        answered = replies(teacher, asked, tokens=REPLY_TOKENS, stop=end, seed=seed)
        dreamt = replies(teacher, [opened] * dreams, tokens=DREAM_TOKENS, stop=None, seed=seed + 1)
        sampled = {"train": answered[: len(prompts)] + dreamt, "held_out": answered[len(prompts) :]}
        kept.write_text(json.dumps(sampled))
    texts = Texts()
    texts.train = [torch.tensor(ids) for ids in sampled["train"]]
    texts.held_out["chat"] = [torch.tensor(ids) for ids in sampled["held_out"]]
    texts.held_out["prompts"] = [torch.tensor(as_prompt(tokenizer, p, reply_follows=False)[:MAX_TOKENS]) for p in held]
    for stem, (train, rest) in plain.items():
        for text in pieces(train, per_file, seed):
            texts.train.append(torch.tensor(tokenizer(text)["input_ids"][:MAX_TOKENS]))
        texts.held_out[stem] = [
            torch.tensor(tokenizer(t)["input_ids"][:MAX_TOKENS]) for t in pieces(rest, HELD_OUT_PIECES, seed)
        ]
    return texts
