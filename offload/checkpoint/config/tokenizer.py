"""The tokenizer of a checkpoint, and what to do about one that does not load."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from cache.errors import CheckpointError
from offload.checkpoint.config.json_object import check_size, read_json_object
from offload.system.text import summary

_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json", "*.model", "*.tiktoken")
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")
_MOST_BYTES = 2**28  # of a vocabulary
_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # and their modules
_TRIAL = string.printable
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # a token and its rank


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the checkpoint in `folder`; None if it has none.

    Raises CheckpointError for one that cannot be loaded, or only with code that is not trusted.
    """
    if not any(_found(folder, _FILES)):
        return None
    _check_files(folder)
    try:
        with _named_in_utf8(folder) as named:
            tokenizer = AutoTokenizer.from_pretrained(named, trust_remote_code=trust_remote_code)
        if not tokenizer(_TRIAL)["input_ids"]:
            raise ValueError("it has no vocabulary")
    except Exception as error:  # a damaged file meets all kinds of parsers, some with errors of their own
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded ({_missing(folder) or summary(error)})"
        ) from error
    return tokenizer


def _check_files(folder: Path) -> None:
    """Raises CheckpointError, naming the file, for one that is too large to be a tokenizer's or is not what it should.

    transformers reads these files without limits, and its errors name none of them.
    """
    for path in _found(folder, _FILES):
        check_size(path, _MOST_BYTES)
    for path in _found(folder, _OBJECTS):
        read_json_object(path, mark=False)
    for path in _found(folder, _TEMPLATES):
        check_size(path)


@contextmanager
def _named_in_utf8(folder: Path) -> Iterator[Path]:
    """`folder` under a name that the library of tokenizers can open: it takes UTF-8 alone."""
    if os.fsencode(folder) == str(folder).encode("utf-8", "replace"):
        yield folder
        return
    with TemporaryDirectory() as place:
        link = Path(place) / "checkpoint"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _missing(folder: Path) -> str | None:
    """What a tokenizer without tokenizer.json needs and does not find, and what to do; None if nothing is known."""
    if (folder / "tokenizer.json").is_file():
        return None
    for path in _found(folder, ("*.model", "*.tiktoken")):
        with path.open("rb") as file:
            ranks = _TIKTOKEN.match(file.read(1024)) is not None
        if ranks:
            return (
                f"{path.name} has tiktoken's ranks alone, without the pattern and the special tokens: put the model's "
                "tokenizer.json beside it, or its own code, with --trust-remote-code"
            )
        packages = " ".join(name for name, module in _PACKAGES.items() if _lacks(module))
        if packages:
            return f"{path.name} is a SentencePiece model without tokenizer.json: pip install {packages}"
    names = [path.name for path in _found(folder, _FILES)]
    return f"there is only {names[0]}: is the download complete?" if len(names) == 1 else None


def _found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]


def _lacks(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:  # the package around it
        return True
