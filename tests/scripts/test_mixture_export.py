"""The mixture's int8 file makes a checkpoint that loads, answers, and is recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_mixture
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cache.errors import CheckpointError
from cache.traces.trace import DECODE, PREFILL, Trace
from offload import OffloadedModel
from offload.demo.int8 import pack, quantise, unpack, write_checkpoint
from scripts.mixture import trace
from scripts.mixture.score import held_out_losses, perplexities, table, text_table
from scripts.mixture.text import Text


def test_a_checkpoint_from_int8_loads_and_is_recorded(tmp_path: Path) -> None:
    model = tiny_mixture.SHAPE.build(0)
    tokenizer = tiny_mixture.tokenizer(tmp_path)
    packed = tmp_path / "model-int8.safetensors"
    size = pack(model, tokenizer, packed)
    assert size == packed.stat().st_size
    assert not list(tmp_path.glob("*.part"))
    unpack(packed, tmp_path / "checkpoint")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    assert type(stock).__name__ == "Qwen3MoeForCausalLM"
    ids = torch.from_numpy(tiny_mixture.tokens(50).astype("int64"))[None]
    with torch.no_grad():
        before, after = model(ids).logits, stock(ids).logits
    assert (after - before).norm() < 0.05 * before.norm()
    with OffloadedModel.from_pretrained(tmp_path / "checkpoint") as offloaded:
        assert offloaded.tokenizer.decode(offloaded.tokenizer("one big")["input_ids"]) == "one big"
    held = {"a": tiny_mixture.tokens(500), "b": tiny_mixture.tokens(400)}
    sequences = trace.stretches(held, tokens=240, length=60)
    assert [len(each) for each in sequences] == [60] * 4
    assert not torch.equal(sequences[0], sequences[1])
    written = tmp_path / "trace.safetensors"
    assert trace.record(tmp_path / "checkpoint", sequences, written, "test") == written.stat().st_size
    found = Trace.open(written)
    assert found.experts.shape == (240, 2, 2)
    assert found.scores is not None and found.scores.shape == (240, 2, 8)
    assert found.predicted is not None and found.predicted.shape[2] == 1
    assert found.model == "mixture"
    assert found.sequence_offsets.tolist() == [0, 60, 120, 180, 240]
    assert (found.phase[:60] == [PREFILL] * trace.PROMPT + [DECODE] * (60 - trace.PROMPT)).all()


def test_a_checkpoint_as_trained_is_the_model(tmp_path: Path) -> None:
    model = tiny_mixture.SHAPE.build(0)
    write_checkpoint(model, tiny_mixture.tokenizer(tmp_path).read_text(encoding="utf-8"), tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_int8_values_are_within_half_a_step() -> None:
    values = torch.randn(6, 40)
    stored, step = quantise(values)
    assert int(stored.abs().max()) == 127
    assert ((stored * step[:, None] - values).abs() <= step[:, None] / 2 + 1e-7).all()


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not an int8 model"):
        unpack(tmp_path / "other.safetensors", tmp_path / "checkpoint")


def test_perplexities_are_by_kind() -> None:
    model = tiny_mixture.SHAPE.build(0)
    texts = [
        Text(name, kind, "package", "1", "CC0", 1_000_000, 50_000) for name, kind in (("a", "prose"), ("b", "code"))
    ]
    held = {"a": tiny_mixture.tokens(500), "b": tiny_mixture.tokens(20)}
    found = perplexities(texts, held_out_losses(model, held, 32))
    assert list(found) == ["prose", "code", "all"]
    assert all(200 < each < 400 for each in found.values())  # of 300 tokens, untrained
    assert found["all"] == pytest.approx((found["prose"] * found["code"]) ** 0.5)
    assert table({"new": found}).splitlines()[0] == "|  | prose | code | all |"
    assert "| a | prose | package | 1 | CC0 | 1.1 |" in text_table(texts)
