"""Files of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.errors import OffloadError
from offload.talk.prompts import read_prompts


def test_prompts_are_read_as_editors_write_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "\\ud83d\\ude00", "domain": "x"}\n')
    assert read_prompts(path) == ["one", "\N{GRINNING FACE}"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "a\\ud83d b"}', 'line 2: its "prompt" has half of a surrogate pair'),
        (b'{"prompt": 5}', "line 2: not a JSON object"),
        (b"[" * 100_000, "line 2: not a JSON object"),
        (b'"prompt"', "line 2: not a JSON object"),
    ],
)
def test_what_is_no_prompt_is_named_by_its_line(line: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "one"}\n' + line)
    with pytest.raises(OffloadError, match=says):
        read_prompts(path)
