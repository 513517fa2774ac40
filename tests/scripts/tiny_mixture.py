"""A tiny mixture, a tokenizer and text, for the tests of scripts/mixture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.mixture.shape import Shape
from scripts.mixture.tokens import Tokens, encode, train_tokenizer

VOCABULARY = 300
SHAPE = Shape(
    vocabulary=VOCABULARY, hidden=32, layers=2, heads=4, kv_heads=2, head_size=8, experts=8, top_k=2, inner=16
)  # fmt: skip
DENSE = Shape(
    vocabulary=VOCABULARY, hidden=32, layers=2, heads=4, kv_heads=2, head_size=8, experts=0, top_k=2, inner=16
)  # fmt: skip


def tokens(count: int = 3000) -> Tokens:
    """Text of a sort: each token says a little about the next."""
    steps = np.random.default_rng(0).integers(1, 7, count)
    return (steps.cumsum() % VOCABULARY).astype(np.uint16)


def tokenizer(folder: Path) -> Path:
    """A tokenizer.json of VOCABULARY tokens."""
    words = [f"one {word} of {number} words" for word in ("big", "small", "long") for number in range(50)]
    made = train_tokenizer(words, VOCABULARY)
    assert encode(made, ["one", "two"])[0] == 0
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
