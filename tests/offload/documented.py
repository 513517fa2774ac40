"""Examples of transformers' own documentation, run on a tiny model: every checkpoint that one names is that model."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny
import torch
import transformers
from small_config import EOS, PAD
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast

from scripts.fuzz.tokenizer import TEMPLATE

VOCABULARY = 1024
_MODELS = ("AutoModelForCausalLM", "Qwen2MoeForCausalLM")
_TOKENIZERS = ("AutoTokenizer", "GPT2Tokenizer")


def docstring(name: str) -> str:
    """That of `name`, a module of transformers, a colon, and what is documented there."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(f"transformers.{module}")
    for part in path.split("."):
        found = getattr(found, part)
    return str(found.__doc__)


def source(name: str) -> str:
    """The code of the examples in a docstring, as a reader copies it: without prompts and what is printed."""
    lines = [line.strip() for line in docstring(name).splitlines()]
    return "\n".join(line[4:] for line in lines if line.startswith((">>>", "...")))


def save(folder: Path, texts: list[str]) -> Path:
    """A tiny checkpoint whose tokenizer has whole words of `texts`, since prompts must be as short as they look."""
    tiny.save(folder, "qwen2_moe", vocab_size=VOCABULARY, max_position_embeddings=2048)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE)
    tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token = special
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, EOS)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def standing_in(model: Any, folder: Path) -> Iterator[None]:
    """While active, transformers' `from_pretrained` gives `model` and its tokenizer. Configurations are put back."""
    real = transformers.AutoTokenizer.from_pretrained
    config, generation_config = deepcopy(vars(model.config)), deepcopy(model.generation_config)
    with ExitStack() as stack:
        for name in _MODELS:
            loader = getattr(transformers, name)
            stack.enter_context(patch.object(loader, "from_pretrained", lambda *args, **kwargs: model))
        for name in _TOKENIZERS:
            loader = getattr(transformers, name)
            stack.enter_context(patch.object(loader, "from_pretrained", lambda *args, **kwargs: real(folder, **kwargs)))
        try:
            yield
        finally:
            vars(model.config).update(config)
            model.generation_config = generation_config


def run(code: str, model: Any, folder: Path) -> tuple[str, dict[str, list[torch.Tensor]]]:
    """What `code` prints with `model`, and the tensors in each name that it leaves behind."""
    names: dict[str, Any] = {}
    printed = io.StringIO()
    torch.manual_seed(0)
    with standing_in(model, folder), redirect_stdout(printed):
        exec(compile(code, "<example>", "exec"), names)
    return printed.getvalue(), {name: tensors for name, value in names.items() if (tensors := _tensors(value))}


def _tensors(value: Any) -> list[torch.Tensor]:
    value = dict(value) if isinstance(value, Mapping) else value
    return [leaf.detach() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
