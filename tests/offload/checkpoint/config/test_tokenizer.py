"""Tokenizers that do not load: what is missing, and what to do."""

from __future__ import annotations

import base64
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_chat import tiny_model

from cache.errors import CheckpointError
from offload.checkpoint.config.tokenizer import load_tokenizer
from scripts.fuzz.tokenizer import tiny_tokenizer

RANKS = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
SENTENCEPIECE = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's configuration, without a tokenizer."""
    tiny_model().config.save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_may_have_none(folder: Path) -> None:
    assert load_tokenizer(folder) is None
    tiny_tokenizer().save_pretrained(folder)
    assert load_tokenizer(folder)("é")["input_ids"] == tiny_tokenizer()("é")["input_ids"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("qwen.tiktoken", RANKS, "qwen.tiktoken has tiktoken's ranks alone.* --trust-remote-code"),
        ("tokenizer.model", RANKS, "tokenizer.model has tiktoken's ranks alone"),
        ("vocab.json", b'{"a": 0}', "there is only vocab.json: is the download complete"),
        ("tokenizer_config.json", b"{}", "there is only tokenizer_config.json: is the download complete"),
        ("tokenizer.json", b'{"version":', "Exception|Error"),
    ],
)
def test_what_is_missing_is_said(name: str, content: bytes, says: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"its tokenizer cannot be loaded \(.*({says})"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_packages_that_a_sentencepiece_model_needs_are_named(name: str, folder: Path) -> None:
    (folder / name).write_bytes(SENTENCEPIECE)
    with pytest.raises(CheckpointError, match=f"{name} is a SentencePiece model .*: pip install sentencepiece"):
        load_tokenizer(folder)
