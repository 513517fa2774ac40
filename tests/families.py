"""A tiny random model of every Mixture-of-Experts language model family that transformers ships.

Families are discovered, not listed: each generative class of transformers' auto mappings whose source builds routed
experts, shrunk from its own default configuration. `python tests/families.py` builds every one and prints what it is.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCAB = 256
PAD, BOS, EOS = 0, 1, 2
_LAYERS = 3
_EXPERTS = 8
_TOP_K = 2

# The largest value a configuration field of this name may keep, at every nesting level.
_SMALL: dict[str, int] = {
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "max_position_embeddings": 512,
    "max_seq_len": 512,
    "hidden_size": 64,
    "d_model": 64,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": _LAYERS,
    "n_layers": _LAYERS,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "kv_n_heads": 2,
    "kv_channels": 16,
    "head_dim": 16,
    "v_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "rotary_dim": 8,
    "sliding_window": 24,
    "sliding_window_size": 24,
    "attention_chunk_size": 24,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "d_rel": 8,
    "rel_extent": 32,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 16,
    "index_topk_blocks": 2,
    "index_block_size": 8,
    "hc_lowrank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 16,
    "block_size": 16,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "ffn_hidden_size": 96,
    "prefix_dense_intermediate_size": 96,
    "moe_intermediate_size": 32,
    "moe_hidden_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_intermediate_size": 48,
    "share_expert_dim": 48,
    "shared_expert_intermediate_size": 48,
    "shared_experts_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "num_experts": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "moe_num_experts": _EXPERTS,
    "num_experts_per_tok": _TOP_K,
    "moe_topk": _TOP_K,
    "moe_top_k": _TOP_K,
    "moe_k": _TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "zero_expert_num": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "router_hidden_size": 16,
    # towers of models that also see or hear; they are built and loaded, but only text is run
    "depth": 1,
    "num_heads": 4,
    "embed_dim": 64,
    "d_ff": 96,
    "ffn_dim": 96,
    "image_size": 28,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "projector_hidden_size": 64,
    "projection_intermediate_size": 96,
    "num_position_embeddings": 16,
    "output_channels": 16,
    "mlp_dim": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_kv": 16,
}

_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}

# What the general rule cannot know: fields whose default leaves out the experts, a layer kind, or a tie between sizes.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2, "moe_num_experts": 8}},
    "deepseek_ocr2": {
        "text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        "vision_config": {"sam_config": {"downsample_channels": [32, 64]}},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 4, "topk_group": 2},
    "dots3_note_text": {
        "head_dim": 24,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{"swa_q_lora_rank": 24, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8},
        "swa_v_head_dim": 16,
    },
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [48, 32], "rope_parameters": _MROPE}},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "global_head_dim": 16,
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 8, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "muse_spark": {
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]},
        "text_config": {"layer_rope_theta": [1e4, 0, 1e4]},
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32, "global_head_dim": 16}},
    "qwen3_omni_moe": {"talker_config": {"text_config": {"shared_expert_intermediate_size": 48}}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 252},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "step3p7": {
        "text_config": {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 24,
        }
    },
}

# Designs that do not follow transformers' common experts contract, and why no expert of theirs can be swapped alone.
OTHER_DESIGN: dict[str, str] = {}


@dataclass(frozen=True)
class Family:
    """One architecture: `name` is the model type of its configuration, `class_name` its class in transformers."""

    name: str
    class_name: str
    text_only: bool

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.class_name)

    def config(self) -> PreTrainedConfig:
        """A small configuration: 64 wide, about three layers, eight experts of which two are chosen."""
        return _shrink(self.model_class.config_class, _OVERRIDES.get(self.name, {}))

    def meta_model(self) -> PreTrainedModel:
        """The small model without memory behind its weights."""
        with torch.device("meta"):
            return self.model_class(self.config())

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        """A small model with random weights in `dtype`, none of them all zeros or all ones: biases, norm scales and router corrections too."""
        torch.manual_seed(seed)
        model = self.model_class._from_config(self.config(), dtype=dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        tensors = dict(model.named_parameters())
        saved = model.state_dict()
        tensors |= {name: b for name, b in model.named_buffers() if name in saved and b.is_floating_point()}
        with torch.no_grad():
            for name, tensor in sorted(tensors.items()):
                noise = torch.randn(tensor.shape, generator=generator)
                if tensor.dim() >= 2:
                    tensor.copy_(noise * tensor.shape[-1] ** -0.5)
                else:
                    tensor.add_((0.1 * noise).to(tensor.dtype))
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{self.name}: {name} is not finite")
        return model


def _small_list(default: list[Any], layers: int) -> list[Any]:
    """`layers` entries that use every kind in `default`: a leading kind that is rare stays one layer, others alternate.

    Ends with the kind that the default ends with, which some families require.
    """
    kinds = list(dict.fromkeys(default))
    if kinds[0] in ("dense", "hash_moe"):
        return [kinds[0]] + [kinds[-1]] * (layers - 1)
    kinds.remove(default[-1])
    kinds.append(default[-1])
    return [kinds[-1 - i % len(kinds)] for i in range(layers)][::-1]


def _shrink(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """An instance of `config_class` in which every field named in `_SMALL` is small, nested configurations included."""
    default = config_class()
    values: dict[str, Any] = {}
    names = {field.name for field in fields(config_class)}
    layers = overrides.get("num_hidden_layers", _LAYERS)
    for name in names:
        value = vars(default).get(name)
        if name in _SMALL and isinstance(value, int):
            values[name] = min(value, _SMALL[name])
        elif name in ("layer_types", "mlp_layer_types") and value:
            values[name] = _small_list(value, layers)
    if "num_key_value_heads" in values and vars(default).get("num_attention_heads") == vars(default)["num_key_value_heads"]:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "mlp_only_layers" in names:
        values["mlp_only_layers"] = []
    for name, token in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)):
        if name in names:
            values[name] = token
    if "use_mamba_kernels" in names:
        values["use_mamba_kernels"] = False
    for name in config_class.sub_configs:
        if isinstance(nested := vars(default).get(name), PreTrainedConfig):
            values[name] = _shrink(type(nested), overrides.get(name, {}))
    return config_class(**(dict(overrides) | values | {k: v for k, v in overrides.items() if not isinstance(v, dict)}))


@functools.cache
def families() -> dict[str, Family]:
    """Every family of transformers' auto mappings that generates text and has routed experts, by name."""
    found: dict[str, Family] = {}
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    for class_name in dict.fromkeys(name for mapping in mappings for name in mapping.values()):
        model_class = getattr(transformers, class_name, None)
        if model_class is None:
            continue
        source = Path(sys.modules[model_class.__module__].__file__).read_text(encoding="utf-8")
        if not re.search(r"\bself\.(experts|num_experts)\b|[Ee]xperts\(|MoE\(", source):
            continue
        name = model_class.config_class.model_type
        found[name] = Family(name, class_name, not model_class.config_class.sub_configs)
    return found
