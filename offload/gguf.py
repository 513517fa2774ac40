"""A GGUF file of the Llama family, read as transformers would have it: tensors by name, tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Iterator
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


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor: "blk.3.attn_q.weight" is "model.layers.3.self_attn.q_proj.weight".

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
    """Reads one GGUF file. The file stays mapped while the object lives; every tensor handed out is a copy.

    Raises CheckpointError when the file is damaged, truncated, or not a Llama model.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(path)
            fields: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path.name} cannot be read as GGUF ({error}): delete it and fetch it again"
            ) from error
        if fields.get("general.architecture") != "llama":
            raise CheckpointError(
                f"{path.name} is a {fields.get('general.architecture')} model: llama is needed"
            )
        self._fields = fields
        self._tensors = {hf_name(tensor.name): tensor for tensor in reader.tensors}

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
        from gguf import dequantize

        tensor = self._tensors[name]
        weight: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
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
