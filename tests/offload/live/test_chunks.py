"""A prompt that is read in chunks is answered as one that is read in one pass, in every family that is served.

`make test` runs the families that carry something over in a way of their own; all of them are marked `full`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import OTHER_DESIGN, Family, families
from small_config import PAD

from cache.errors import UnsupportedFamilyError

PROMPT, STEPS = 48, 4
INDEX_HEADS = {"index_n_heads": 64}
INDEXED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4"), INDEX_HEADS),
    "mistral_large4": {"text_config": INDEX_HEADS},
}
"""Sparse attention: an index of two heads gives many tokens a score of zero, and which of those are taken is chance."""
LONG_ROPE: dict[str, Any] = {
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
        "long_factor": [4.0] * 8,
        "short_factor": [1.0] * 8,
        "long_mscale": 1.3,
        "short_mscale": 1.0,
        "factor": 4.0,
    },
}
"""Phi-3.5-MoE's positions: others for all tokens once there are more than 32."""
IN_A_WAY_OF_THEIR_OWN = {
    "jamba": "Mamba-1 layers",
    "minimax": "linear attention, in a cache of its own",
    "nemotron_h": "Mamba-2 layers",
    "phimoe": "positions that change with the length",
    "unlimited_ocr": "a window over the reply, and none over the prompt",
}

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


def configured(name: str) -> dict[str, Any]:
    return LONG_ROPE if name == "phimoe" else INDEXED.get(name, {})


def padded_batch() -> dict[str, torch.Tensor]:
    """Three prompts; the first begins with more padding than a chunk has tokens."""
    ids, mask = tiny.ids(3, PROMPT), torch.ones(3, PROMPT, dtype=torch.long)
    for row, padding in enumerate((20, 0, 3)):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    """Of every step of a reply [steps, rows, vocabulary]."""
    output = model.generate(
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return torch.stack(output.logits)


def check(family: Family, folder: Path, chunks: Sequence[int]) -> None:
    family.save(folder, torch.float32, **configured(family.name))
    resident = family.resident(folder, torch.float32)
    one = {"input_ids": tiny.ids(1, PROMPT, seed=1)}
    with tiny.open_model(folder, context=512) as model:
        for prompts in (padded_batch(), one)[: len(chunks)]:
            expected = logits(resident, **prompts)
            assert torch.isfinite(expected).all()
            assert tiny.same_bits(logits(model, **prompts), expected)  # in one pass
            for a_chunk in chunks:
                model.reset_stats()
                found = logits(model, **prompts, prefill_chunk_size=a_chunk)
                assert model.stats.as_dict()["prefill_tokens"] == prompts["input_ids"].numel()
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", IN_A_WAY_OF_THEIR_OWN)
def test_chunks_are_answered_as_the_whole(name: str, tmp_path: Path) -> None:
    check(families()[name], tmp_path, (7,))


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(families().keys() - OTHER_DESIGN.keys()))
def test_chunks_are_answered_as_the_whole_in_every_family(name: str, tmp_path: Path) -> None:
    try:
        check(families()[name], tmp_path, (16, 7))
    except UnsupportedFamilyError:
        assert families()[name].may_be_refused


@pytest.mark.parametrize("prefill", ["streamed", "kept", "on-demand"])
def test_chunks_are_answered_as_the_whole_however_experts_are_fetched(prefill: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, "jamba")
    expected = logits(tiny.resident(tmp_path), **padded_batch())
    with tiny.open_model(tmp_path, expert_cache=tiny.FEW, prefill=prefill) as model:
        found = logits(model, **padded_batch(), prefill_chunk_size=16)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_workspace_makes_chunks_of_a_prompt(tmp_path: Path) -> None:
    """One context has passes of 64 tokens, the other one pass for all."""
    tiny.save(tmp_path, "jamba")
    said = []
    for context, longest in ((100, 64), (300, 256)):
        with tiny.open_model(tmp_path, context=context) as model:
            assert model.plan.chunk == longest
            said.append(logits(model, input_ids=tiny.ids(1, 90)))
    torch.testing.assert_close(*said, rtol=0, atol=1e-4)
