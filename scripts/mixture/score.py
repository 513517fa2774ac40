"""Perplexity on held-out text, and its table."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from offload.system.progress import progress_bar
from scripts.mixture.forward import final_hidden
from scripts.mixture.text import Text
from scripts.mixture.tokens import Tokens, windows

WINDOWS = 32  # of each source
TOGETHER = 8


@torch.no_grad()
def loss(model: Any, rows: torch.Tensor) -> float:
    """The mean negative log-likelihood of all but the first token of `rows` [windows, S + 1], in float32."""
    total = 0.0
    for part in rows.split(TOGETHER):
        hidden, _ = final_hidden(model, part[:, :-1], torch.float32)
        logits = F.linear(hidden, model.model.embed_tokens.weight)
        total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())) * len(part)
    return total / len(rows)


def held_out_losses(model: Any, held: dict[str, Tokens], length: int) -> dict[str, float]:
    """Of each source, the loss on windows that are spread over its held-out text."""
    found = {}
    with progress_bar("perplexity", len(held)) as bar:
        for name, tokens in held.items():
            rows = windows(tokens, min(length, len(tokens) - 1))
            found[name] = loss(model, rows[:: max(1, len(rows) // WINDOWS)][:WINDOWS])
            bar.advance()
    return found


def perplexities(texts: list[Text], found: dict[str, float]) -> dict[str, float]:
    """Of each kind of text, and of "all": exp of the mean of its sources' losses."""
    kinds: dict[str, list[float]] = {}
    for text in texts:
        kinds.setdefault(text.kind, []).append(found[text.name])
    return {kind: math.exp(sum(each) / len(each)) for kind, each in {**kinds, "all": list(found.values())}.items()}


def table(columns: dict[str, dict[str, float]]) -> str:
    """Perplexities of each model, in Markdown."""
    kinds = list(next(iter(columns.values())))
    lines = [["", *kinds], ["---"] * (len(kinds) + 1)]
    lines += [[name, *(f"{found[kind]:.2f}" for kind in kinds)] for name, found in columns.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text_table(texts: list[Text]) -> str:
    """Where the text comes from, in Markdown."""
    lines = ["| source | kind | package | version | licence | MB |", "|---|---|---|---|---|---|"]
    for text in texts:
        size = (text.train_bytes + text.held_bytes) / 1e6
        cells = (text.name, text.kind, text.package, text.version, text.licence, f"{size:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
