"""A GGUF file of the Llama family, read as transformers would have it: tensors by name, tokenizer files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CheckpointError

_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # llama.cpp's token type for special tokens

_STRING, _ARRAY = 8, 9  # metadata types; the numbers by their struct codes
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_F32, _Q4_1, _Q8_0 = 0, 3, 8  # tensor types; quantised ones in blocks of 32 weights: w = d q (+ m)
_BLOCK = 32
_BLOCKS = {
    _Q4_1: np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", (16,))]),
    _Q8_0: np.dtype([("d", "<f2"), ("q", "i1", (32,))]),
}
_BYTES_PER_BLOCK = {_F32: 4 * _BLOCK} | {kind: block.itemsize for kind, block in _BLOCKS.items()}


def hf_name(name: str) -> str:
    """A GGUF tensor's name at Hugging Face: blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight.

    Raises CheckpointError for a tensor that a Llama model does not have.
    """
    stem, _, kind = name.rpartition(".")
    if stem in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[stem]}.{kind}"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if block != "blk" or part not in _LAYER_NAMES:
        raise CheckpointError(f"GGUF tensor {name} is no part of a Llama model: this file cannot be used")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"


class _Reader:
    """Walks GGUF's little-endian values in `data` from byte `at` on."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def number(self, code: str) -> Any:
        """One value of struct format `code`."""
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        """A 64-bit length and so many bytes of UTF-8."""
        size = self.number("Q")
        raw = self.data[self.at : self.at + size]
        if len(raw) != size:
            raise ValueError("a string runs past the end")
        self.at += size
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        """A metadata value of GGUF's type `kind`."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner = self.number("I")
            return [self.value(inner) for _ in range(self.number("Q"))]
        return self.number(_NUMBERS[kind])


@dataclass(frozen=True)
class _Stored:
    """Where a tensor's bytes are, and how they are written. `shape` is row-major."""

    shape: tuple[int, ...]
    kind: int
    at: int

    def read(self, data: bytes) -> NDArray[np.float32]:
        """The tensor in float32: a copy."""
        count = math.prod(self.shape)
        if self.kind == _F32:
            return np.frombuffer(data, "<f4", count, self.at).reshape(self.shape).astype(np.float32)
        blocks = np.frombuffer(data, _BLOCKS[self.kind], count // _BLOCK, self.at)
        values = blocks["q"]
        if self.kind == _Q4_1:  # 16 bytes: the low nibbles are the block's first half
            values = np.concatenate([values & 15, values >> 4], axis=1)
        weights = values.astype(np.float32) * blocks["d"].astype(np.float32)[:, None]
        if self.kind == _Q4_1:
            weights += blocks["m"].astype(np.float32)[:, None]
        return weights.reshape(self.shape)


def _parse(data: bytes) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """(metadata, tensors by GGUF name) of a whole GGUF file. Raises ValueError or struct.error when it is damaged."""
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    reader = _Reader(data, 4)
    if (version := reader.number("I")) not in (2, 3):
        raise ValueError(f"version {version} is unknown")
    tensors, fields = reader.number("Q"), reader.number("Q")
    metadata = {reader.string(): reader.value(reader.number("I")) for _ in range(fields)}
    found = []
    for _ in range(tensors):
        name, axes = reader.string(), reader.number("I")
        shape = tuple(reversed([reader.number("Q") for _ in range(axes)]))
        found.append((name, shape, reader.number("I"), reader.number("Q")))
    align = metadata.get("general.alignment", 32)
    start = -(-reader.at // align) * align
    stored = {}
    for name, shape, kind, offset in found:
        if kind not in _BYTES_PER_BLOCK:
            raise ValueError(f"{name} has the unknown type {kind}")
        stored[name] = _Stored(shape, kind, start + offset)
        end = start + offset + math.prod(shape) * _BYTES_PER_BLOCK[kind] // _BLOCK
        if end > len(data):
            raise ValueError(f"{name} ends at byte {end} of {len(data)}")
    return metadata, stored


class LlamaGGUF:
    """A Llama model in GGUF's format, from the bytes of the whole file.

    Raises CheckpointError when the file is damaged, truncated, not a Llama model, or has tensors in a format other
    than F32, Q4_1 and Q8_0.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._fields, tensors = _parse(data)
        except (ValueError, KeyError, OverflowError, struct.error) as error:
            raise CheckpointError(f"the GGUF file cannot be read ({error}): fetch it again") from error
        if (kind := self._fields.get("general.architecture")) != "llama":
            raise CheckpointError(f"the GGUF file holds a {kind} model: a llama is needed")
        self._data = data
        self._tensors = {hf_name(name): tensor for name, tensor in tensors.items()}

    def config(self) -> dict[str, Any]:
        """The keys of transformers' LlamaConfig that the file states."""
        fields = self._fields
        return {
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "hidden_size": fields["llama.embedding_length"],
            "intermediate_size": fields["llama.feed_forward_length"],
            "num_hidden_layers": fields["llama.block_count"],
            "num_attention_heads": fields["llama.attention.head_count"],
            "num_key_value_heads": fields["llama.attention.head_count_kv"],
            "max_position_embeddings": fields["llama.context_length"],
            "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 9),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
            "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
            "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        }

    def names(self) -> Iterator[str]:
        """Hugging Face names of the tensors, in the file's order."""
        return iter(self._tensors)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Tensor `name`, dequantised, in Hugging Face's layout ([out, in] for matrices)."""
        weight = self._tensors[name].read(self._data)
        if name.endswith("q_proj.weight"):
            return _unpermute(weight, self._fields["llama.attention.head_count"])
        if name.endswith("k_proj.weight"):
            return _unpermute(weight, self._fields["llama.attention.head_count_kv"])
        return weight

    def save_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json (with the chat template) into `folder`."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        fields = self._fields
        tokens: list[str] = fields["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        # llama.cpp's name "smollm" stands for these two steps: digits one by one, then GPT-2's split.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        kinds = fields["tokenizer.ggml.token_type"]
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        tokenizer.save(str(folder / "tokenizer.json"))

        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
            "model_max_length": fields["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": fields["tokenizer.chat_template"],
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's reordering of q and k rows: rotary pairs (2i, 2i+1) back to halves (i, i + d/2)."""
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows, columns)
