"""Every JSON file around the weights is read with limits, and named in one line if it cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from cache.errors import CheckpointError
from offload.checkpoint.config.file import ConfigFile
from offload.checkpoint.config.generation import read_generation_config
from offload.checkpoint.config.tokenizer import load_tokenizer
from offload.checkpoint.shards import ShardIndex

READERS: dict[str, Callable[[Path], object]] = {
    "config.json": lambda folder: ConfigFile.read("m", folder),
    "generation_config.json": read_generation_config,
    "model.safetensors.index.json": ShardIndex.from_folder,
    "tokenizer_config.json": load_tokenizer,
    "special_tokens_map.json": load_tokenizer,
    "added_tokens.json": load_tokenizer,
}

FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not JSON (JSONDecodeError: "),
    "cut": (b'{"do_sample": tru', "is not JSON (JSONDecodeError: Expecting value"),
    "a list": (b"[]", "is not a JSON object"),
    "null": (b"null", "is not a JSON object"),
    "too deep to parse": (b"[" * 10**5, "is not JSON (RecursionError: "),
    "deep": (b'{"x": ' + b"[" * 500 + b"]" * 500 + b"}", "is nested more than 100 deep"),
    "a long number": (b'{"x": ' + b"9" * 5000 + b"}", "is not JSON (ValueError: "),
    "no UTF-8": (b'{"x": "\xff"}', "is not JSON (UnicodeDecodeError: "),
    "UTF-16": ('{"x": 1}'.encode("utf-16"), "is not JSON (UnicodeDecodeError: "),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def said(name: str, folder: Path) -> str:
    """The one line that reading the file `name` ends with."""
    with pytest.raises(CheckpointError) as refused:
        READERS[name](folder)
    message = str(refused.value)
    assert message.startswith(str(folder / name)) and "\n" not in message
    return message


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_object_is_said(name: str, fault: str, folder: Path) -> None:
    content, expected = FAULTS[fault]
    (folder / name).write_bytes(content)
    assert expected in said(name, folder)


@pytest.mark.parametrize("name", [*READERS, "tokenizer.json", "vocab.json", "chat_template.jinja"])
def test_a_huge_file_is_not_read(name: str, folder: Path) -> None:
    (folder / name).touch()
    os.truncate(folder / name, 2**40)
    with pytest.raises(CheckpointError, match=f"{name} has 1099511627776 bytes, and no such file has more than"):
        READERS.get(name, load_tokenizer)(folder)


@pytest.mark.parametrize("name", READERS)
def test_a_key_that_is_there_twice(name: str, folder: Path) -> None:
    (folder / name).write_text('{"a": {"x": 1, "x": 1}, "weight_map": {"w": "x", "w": "y"}}')
    with pytest.warns(UserWarning) as warned, suppress(CheckpointError):  # the rest of it is no checkpoint
        READERS[name](folder)
    assert [str(each.message) for each in warned] == [f'{folder / name}: "w" is there twice: the last one counts']


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_refused_where_transformers_refuses_it(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"\xef\xbb\xbf{}")
    if name == "generation_config.json":
        assert read_generation_config(folder) is not None
    elif name == "model.safetensors.index.json":
        assert "its weight_map does not say" in said(name, folder)
    else:
        assert "Unexpected UTF-8 BOM" in said(name, folder)
