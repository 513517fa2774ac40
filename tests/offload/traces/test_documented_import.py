"""The lines of docs/traces.md that save transformers' router logits: what they save is what a recording has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

from cache.traces.imports.logged import ImportOptions
from cache.traces.imports.read import Log
from cache.traces.trace import Trace

REPOSITORY = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    yield from tiny.one_thread()


class Words:
    """A tokenizer of prompts that are lists of ids."""

    def __call__(self, prompt: list[int], return_tensors: str) -> transformers.BatchEncoding:
        ids = torch.tensor([prompt])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def snippet() -> str:
    text = (REPOSITORY / "docs" / "traces.md").read_text(encoding="utf-8")
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "output_router_logits" in code]
    return str(found)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_logits_saved_as_documented_are_the_recording(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny.save(tmp_path / "model", family)
    prompts = [[5, 6, 7, 8], [9, 10]]
    monkeypatch.chdir(tmp_path)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    plain.generation_config.do_sample = False
    code = compile(snippet().replace("200", "5"), "docs", "exec")
    exec(code, {"prompts": prompts, "tokenizer": Words(), "model": plain})
    with (
        tiny.open_model(checkpoint) as model,
        model.record_trace(tmp_path / "recorded", workload="test", scores=True),
    ):
        for prompt in prompts:
            model.generate(**Words()(prompt, "pt"), max_new_tokens=5, do_sample=False)
    recorded = Trace.open(tmp_path / "recorded")
    options = ImportOptions(top_k=recorded.top_k, scores=True)
    Log(tmp_path / "log").write(tmp_path / "imported", options)
    imported = Trace.open(tmp_path / "imported")
    for name in ("experts", "sequence_offsets", "step", "phase"):
        np.testing.assert_array_equal(getattr(imported, name), getattr(recorded, name), name)
    proportions = recorded.weights / recorded.weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(imported.weights, proportions, atol=1e-4)
    assert imported.scores is not None and recorded.scores is not None
    np.testing.assert_allclose(imported.scores, recorded.scores, atol=1e-2)
