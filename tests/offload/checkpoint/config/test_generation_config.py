"""generation_config.json as people write it."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from cache.errors import CheckpointError
from offload.checkpoint.config.generation import read_generation_config


def read(folder: Path, content: Any) -> Any:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    return read_generation_config(folder)


def test_what_is_right_is_taken_as_it_is(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(tmp_path, {"do_sample": True, "temperature": 1, "top_k": 7, "eos_token_id": [2, 9], "own": "x"})
        assert (found.temperature, found.top_k, found.eos_token_id, found.own) == (1.0, 7, [2, 9], "x")
        assert read(tmp_path, {"top_k": 5.0, "max_time": None, "stop_strings": ["2"]}).top_k == 5
        assert math.isnan(read(tmp_path, {"own": math.nan}).own)
        assert read(tmp_path, "\ufeff{}").do_sample is None


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"do_sample": True, "temperature": 0}, {"do_sample": False, "temperature": None}),
        ({"do_sample": True, "temperature": "0.7"}, {"do_sample": True, "temperature": 0.7}),
        ({"do_sample": True, "temperature": "0"}, {"do_sample": False, "temperature": None}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": "20"}, {"top_k": 20}),
        ({"do_sample": "false"}, {"do_sample": False}),
        ({"eos_token_id": "257"}, {"eos_token_id": 257}),
        ({"eos_token_id": ["257", 3]}, {"eos_token_id": [257, 3]}),
        ({"max_new_tokens": -1}, {"max_new_tokens": None}),
        ({"prefill_chunk_size": 0}, {"prefill_chunk_size": None}),
        ({"prefill_chunk_size": True}, {"prefill_chunk_size": 1}),
        ({"compile_config": {"mode": "x"}}, {"compile_config": None}),
    ],
)
def test_what_others_understand_is_mended_with_a_warning(
    given: dict[str, Any], taken: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=rf"generation_config.json: {list(given)[-1]} is "):
        found = read(tmp_path, given)
    assert {name: getattr(found, name) for name in taken} == taken


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"temperature": "hot"}, 'temperature is "hot", which is no number'),
        ({"temperature": float("nan")}, "temperature is NaN, which is no number"),
        ({"temperature": -1}, "temperature is -1.0, and must be 0 or more"),
        ({"top_k": 2.5}, "top_k is 2.5, which is no whole number"),
        ({"top_k": [1]}, r"top_k is \[1\], which is no whole number"),
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id is .*, which is no whole number"),
        ({"cache_implementation": "wonderful"}, "Invalid `cache_implementation`"),
        ({"forced_eos_token_id": 2, "suppress_tokens": [2]}, "also in `suppress_tokens`"),
    ],
)
def test_what_nobody_can_use_is_refused_by_name(content: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config.json: it cannot be used \(.*{says}"):
        read(tmp_path, content)
