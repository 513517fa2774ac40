"""A GGUF file of the Llama family, read as transformers would have it: tensors by name, tokenizer files.

transformers reads the container and unpacks blocks; loading the whole model through it takes several times as long, and
its tokenizer would not split numbers into digits.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.integrations.gguf.dequant import dequantize
from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata

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
_STRINGS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")  # arrays of strings that are read, not just counted


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


class LlamaGGUF:
    """A Llama model in the GGUF file `path`, of which tensors are read when they are asked for.

    Raises CheckpointError when the file is damaged, truncated, not a Llama model, or has tensors in a format that
    transformers does not unpack.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._fields, _ = read_gguf_metadata(str(path), _STRINGS)
            header = GgufHeader.from_file(str(path))
            end = max(header.data_start + info.offset + info.nbytes for info in header.tensors)
            if end > path.stat().st_size:
                raise ValueError(f"it holds {path.stat().st_size} of {end} bytes")
        except (ValueError, KeyError, OverflowError, struct.error) as error:
            raise CheckpointError(f"the GGUF file cannot be read ({error}): fetch it again") from error
        if header.architecture != "llama":
            raise CheckpointError(f"the GGUF file holds a {header.architecture} model: a llama is needed")
        stored = load_gguf_state_dict(header)
        self._tensors = {hf_name(info.name): (stored[info.name], info.shape) for info in header.tensors}

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

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Tensor `name`, dequantised, in Hugging Face's layout ([out, in] for matrices)."""
        stored, shape = self._tensors[name]
        values: torch.Tensor = stored[...]
        if values.dtype == torch.uint8:
            values = dequantize(values.reshape(-1), stored.ggml_type).reshape(shape)
        weight: NDArray[np.float32] = values.float().numpy()
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
