"""Tiny checkpoints of three families, whole and right: what the fuzzer mutates.

They are small, but have what large ones have: several shards and their index, a tokenizer, a chat template, defaults
for generating. Their weights are large, so that another weight is another answer.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from scripts.fuzz.tokenizer import tiny_tokenizer

SHARD_BYTES = 60_000
_SHAPE: Mapping[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "bos_token_id": None,
}


def _qwen3() -> Any:
    """Experts one by one in the checkpoint, in float32."""
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "intermediate_size": 32, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SHAPE, **experts))


def _gpt_oss() -> Any:
    """Experts in one tensor, with biases and a sliding window, in bfloat16."""
    experts = {"num_local_experts": 4, "intermediate_size": 16, "head_dim": 16, "sliding_window": 8}
    return GptOssForCausalLM(GptOssConfig(**_SHAPE, **experts)).bfloat16()


def _deepseek_v3() -> Any:
    """A dense layer first, shared experts, latent attention, in bfloat16."""
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1}
    shape = {**_SHAPE, "num_key_value_heads": 2}
    config = DeepseekV3Config(**shape, **sizes, **experts, intermediate_size=32, first_k_dense_replace=1)
    return DeepseekV3ForCausalLM(config).bfloat16()


FAMILIES: Mapping[str, Callable[[], Any]] = {"qwen3_moe": _qwen3, "gpt_oss": _gpt_oss, "deepseek_v3": _deepseek_v3}


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """A checkpoint of each family in a folder of its own in `folder`, by the family's name."""
    written = {}
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make().eval()
            for weight in model.parameters():  # routers' corrections, biases and norms are made as zeros and ones
                weight.data.add_(torch.randn_like(weight), alpha=0.1)
            model.save_pretrained(folder / name, max_shard_size=SHARD_BYTES)
        tiny_tokenizer(model_max_length=512).save_pretrained(folder / name)
        defaults = {"do_sample": False, "eos_token_id": 257, "pad_token_id": 257, "max_new_tokens": 5}
        (folder / name / "generation_config.json").write_text(json.dumps(defaults))
        written[name] = folder / name
    return written
