"""scripts/soak.py, shortly: nothing grows, every answer is right, and it notices both where they are not so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from scripts import soak

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_few_rounds_and_calls_leave_nothing_behind(checkpoint: Path, device: str, capsys: Any) -> None:
    code = soak.main([str(checkpoint), "--rounds=6", "--calls=24", "--threads=4", "--device", device])
    found = json.loads(capsys.readouterr().out)
    assert (found["wrong_in_rounds"], found["wrong_calls"]) == (0, 0)
    assert found["growth"]["threads"] == found["growth"]["descriptors"] == 0
    assert code == 0 and found["fine"]


def test_what_grows_is_noticed() -> None:
    flat = [soak.Left(900 + i % 2, 5, 9) for i in range(30)]
    assert soak.is_flat(soak.grown(flat))
    for step in (soak.Left(2**20, 0, 0), soak.Left(0, 1, 0), soak.Left(0, 0, 1)):
        rising = [soak.Left(*(a + i * b for a, b in zip(left, step, strict=True))) for i, left in enumerate(flat * 2)]
        assert not soak.is_flat(soak.grown(rising)), step


def test_a_wrong_answer_is_noticed(checkpoint: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "context": 64, "threads": 1}
    with soak.OffloadedModel.from_pretrained(checkpoint, **options) as model:
        asked = soak.prompts(model.config.vocab_size)
        expected = [soak.answer(model, prompt) for prompt in asked]
    expected[3][0] += 1
    assert soak.ask_from_threads(checkpoint, 16, 2, options, expected) == 2
    assert soak.one_round(checkpoint, 3, options, expected) == 1
