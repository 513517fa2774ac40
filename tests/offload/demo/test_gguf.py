"""Reading a GGUF: values, names, layout, tokenizer, damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_demo
from transformers import AutoTokenizer

from cache.errors import CheckpointError
from offload.demo.gguf import LlamaGGUF, hf_name


def written(name: str, seed: int = 0) -> np.ndarray:
    """The weights that `tiny_demo.gguf` drew for one tensor."""
    rng = np.random.default_rng(seed)
    for each, shape in tiny_demo.SHAPES.items():
        weight = rng.standard_normal(shape).astype(np.float32) * 0.2 + (1.0 if "norm" in each else 0.0)
        if each == name:
            return weight.astype(np.float32)
    raise KeyError(name)


@pytest.fixture
def model(tmp_path: Path) -> LlamaGGUF:
    return LlamaGGUF(tiny_demo.write_gguf(tmp_path / "model.gguf"))


def test_every_tensor_comes_back_within_its_format_error(model: LlamaGGUF) -> None:
    for name in tiny_demo.SHAPES:
        if "attn_q" in name or "attn_k" in name:
            continue  # reordered: tested below
        want, got = written(name), model.tensor(hf_name(f"{name}.weight"))
        spread = float(want.max() - want.min())
        error = {0: 0.0, 3: spread / 30 + 2e-3, 8: spread / 254 + 2e-3}[tiny_demo.kind_of(name)]
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= error, name


def test_q4_1_keeps_the_order_of_a_block(tmp_path: Path) -> None:
    """Sixteen levels, ascending: low nibbles are the first half of a block, high nibbles the second."""
    ramp = np.concatenate([np.arange(16), np.arange(16)[::-1]]).astype(np.float32)
    raw = tiny_demo.gguf()
    weight = np.tile(ramp, tiny_demo.NEURONS * tiny_demo.HIDDEN // 32)
    at = raw.rindex(tiny_demo.quantise(written("blk.1.ffn_up"), 3))
    patched = tiny_demo.quantise(weight, 3)
    model = LlamaGGUF(tiny_demo.write_gguf(tmp_path / "m.gguf", raw[:at] + patched + raw[at + len(patched) :]))
    assert np.array_equal(model.tensor("model.layers.1.mlp.up_proj.weight").reshape(-1), weight)


def test_rotary_rows_are_put_back_into_halves(model: LlamaGGUF) -> None:
    """llama.cpp stores rows (0, d/2, 1, d/2 + 1, ...) of each head; undoing it must give rows 0, 1, 2, ..."""
    stored = written("blk.0.attn_q").reshape(tiny_demo.HEADS, -1, 2, tiny_demo.HIDDEN)
    got = model.tensor("model.layers.0.self_attn.q_proj.weight")
    halves = got.reshape(tiny_demo.HEADS, 2, -1, tiny_demo.HIDDEN)
    assert np.abs(halves[:, 0] - stored[:, :, 0]).max() < 0.06
    assert np.abs(halves[:, 1] - stored[:, :, 1]).max() < 0.06


def test_config_and_tokenizer(model: LlamaGGUF, tmp_path: Path) -> None:
    config = model.config()
    assert (config["num_hidden_layers"], config["hidden_size"]) == (tiny_demo.LAYERS, tiny_demo.HIDDEN)
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-5
    model.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "hello 12 wörld\n<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[:2] == [tiny_demo.TOKENS.index("he"), tiny_demo.TOKENS.index("ll")]
    assert ids[-1] == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("keep", [0, 3, 40, 2000, -1])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    raw = tiny_demo.gguf()
    with pytest.raises(CheckpointError, match="fetch it again"):
        LlamaGGUF(tiny_demo.write_gguf(tmp_path / "m.gguf", raw[:keep]))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mamba"):
        LlamaGGUF(tiny_demo.write_gguf(tmp_path / "m.gguf", tiny_demo.gguf(architecture="mamba")))


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_a"):
        hf_name("blk.0.ssm_a.weight")
