"""The tokenizer, trained on the text, and the text as tokens: windows of one length, in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from offload.system.progress import progress_bar
from scripts.mixture.text import Text, read

VOCABULARY = 4096
END = "<|endoftext|>"  # token 0: before every block
TOKENIZER = "tokenizer.json"

Tokens = NDArray[np.uint16]


def train_tokenizer(documents: Iterable[str], vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE (tokenizers.Tokenizer) of `vocabulary` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Any, documents: list[str]) -> Tokens:
    """The tokens of all documents, END before each."""
    end = tokenizer.token_to_id(END)
    rows = [np.array([end, *each.ids], np.uint16) for each in tokenizer.encode_batch(documents)]
    return np.concatenate(rows) if rows else np.zeros(0, np.uint16)


def prepare(work: Path, texts: list[Text]) -> tuple[Any, Tokens, dict[str, Tokens]]:
    """(tokenizer, training tokens, held-out tokens of each source), made in `work` if they are not there yet."""
    from tokenizers import Tokenizer

    kept, path = work / TOKENIZER, work / "tokens.safetensors"
    if not kept.exists():
        train_tokenizer(block for text in texts for block in read(work, text.name, "train")[::4]).save(str(kept))
    tokenizer = Tokenizer.from_file(str(kept))
    if not path.exists():
        found: dict[str, Tokens] = {}
        with progress_bar("tokens", len(texts)) as bar:
            for text in texts:
                for part in ("train", "held"):
                    found[f"{part}.{text.name}"] = encode(tokenizer, read(work, text.name, part))
                bar.advance()
        save_file(found, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    tokens = load_file(path)
    held = {text.name: tokens[f"held.{text.name}"] for text in texts}
    return tokenizer, np.concatenate([tokens[f"train.{text.name}"] for text in texts]), held


def windows(tokens: Tokens, length: int, start: int = 0) -> torch.Tensor:
    """[windows, length + 1] int64: each begins with the last token of the one before."""
    count = (len(tokens) - start - 1) // length
    rows = np.lib.stride_tricks.sliding_window_view(tokens[start:], length + 1)[: count * length : length]
    return torch.from_numpy(rows.astype(np.int64))


class Batches:
    """The training windows of any step, without state: a permutation of its own for every pass over the text."""

    def __init__(self, tokens: Tokens, length: int, rows: int, seed: int) -> None:
        self._tokens, self._length, self._rows, self._seed = tokens, length, rows, seed
        self.steps_a_pass = ((len(tokens) - length - 1) // length) // rows
        if self.steps_a_pass < 1:
            raise SystemExit(f"{len(tokens)} tokens of text are less than one step's {rows} windows of {length}")
        self._pass: tuple[int, torch.Tensor] | None = None

    def step(self, step: int) -> torch.Tensor:
        """[rows, length + 1] int64."""
        number, at = divmod(step, self.steps_a_pass)
        if self._pass is None or self._pass[0] != number:
            generator = torch.Generator().manual_seed(self._seed * 1000 + number)
            start = int(torch.randint(self._length, (1,), generator=generator))
            count = (len(self._tokens) - start - 1) // self._length
            self._pass = number, torch.randperm(count, generator=generator) * self._length + start
        chosen = self._pass[1][at * self._rows : (at + 1) * self._rows].tolist()
        return torch.stack(list(self._rows_at(chosen)))

    def _rows_at(self, starts: list[int]) -> Iterator[torch.Tensor]:
        for start in starts:
            yield torch.from_numpy(self._tokens[start : start + self._length + 1].astype(np.int64))
