"""A family's default configuration, made small: 64 wide, three layers, eight experts of which three are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

PAD, BOS, EOS = 0, 1, 2
# As in the table below. Sums of two numbers would come out alike in any order and precision.
LAYERS, EXPERTS, TOP_K = 3, 8, 3

# The largest value that a configuration field of these names may keep, at every nesting level.
_SMALL_FIELDS = """
256 vocab_size unpadded_vocab_size vocab_size_per_layer_input
2048 max_position_embeddings max_seq_len
64 hidden_size d_model
3 num_hidden_layers n_layers
8 num_experts num_local_experts n_routed_experts moe_num_experts
3 num_experts_per_tok moe_topk moe_top_k moe_k
4 num_attention_heads n_heads swa_num_attention_heads n_group
2 num_layers num_key_value_heads kv_n_heads swa_num_key_value_heads o_groups topk_group zero_expert_num
16 head_dim v_head_dim swa_head_dim kv_channels kv_lora_rank o_lora_rank router_hidden_size
8 qk_rope_head_dim qk_nope_head_dim rotary_dim d_rel hc_lowrank hidden_size_per_layer_input
24 sliding_window sliding_window_size attention_chunk_size q_lora_rank
32 moe_intermediate_size moe_hidden_size expert_ffn_hidden_size rel_extent
48 shared_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
48 moe_shared_expert_intermediate_size share_expert_dim
96 intermediate_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size ffn_hidden_size
1 n_shared_experts num_shared_experts moe_num_shared_experts
1 first_k_dense_replace num_dense_layers moe_layer_start_index
16 index_head_dim index_topk block_size mamba_d_head mamba_head_dim mamba_chunk_size chunk_size linear_head_dim
8 index_block_size mamba_d_state ssm_state_size mamba_n_heads mamba_num_heads
8 linear_key_head_dim linear_value_head_dim
4 linear_num_value_heads mamba_dt_rank
2 index_n_heads index_topk_blocks linear_num_key_heads linear_num_heads
1 n_groups
64 embed_dim out_hidden_size text_hidden_size projector_hidden_size
96 d_ff ffn_dim mlp_dim projection_intermediate_size encoder_ffn_dim decoder_ffn_dim
28 image_size
16 d_kv num_position_embeddings output_channels
4 num_heads encoder_attention_heads decoder_attention_heads
2 encoder_layers decoder_layers num_decoder_layers
1 depth
"""
_SMALL = {name: int(n) for n, *names in map(str.split, _SMALL_FIELDS.strip().splitlines()) for name in names}

# What the general rule cannot know: defaults that lack experts or a kind of layer, sizes tied to others.
_ROUTED: dict[str, Any] = {"num_experts_per_tok": TOP_K, "n_group": 4, "topk_group": 2}
_GEMMA: dict[str, Any] = {
    "num_experts": EXPERTS,
    "top_k_experts": TOP_K,
    "moe_intermediate_size": 32,
    "global_head_dim": 16,
}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": TOP_K, "moe_num_experts": EXPERTS},
    },
    "deepseek_ocr2": {
        "text_config": {"num_experts_per_tok": TOP_K, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        "vision_config": {"sam_config": {"downsample_channels": [32, 64]}},
    },
    "deepseek_v2": {**_ROUTED, "topk_method": "group_limited_greedy"},
    "diffusion_gemma": {"text_config": _GEMMA},
    "doge": {"is_moe": True},
    "dots1": {**_ROUTED, "n_routed_experts": EXPERTS, "n_shared_experts": 1},
    "dots3_note_text": {
        "head_dim": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [48, 32], "rope_parameters": _MROPE}},
    "gemma4_text": {**_GEMMA, "enable_moe_block": True},
    "glm4v_moe": {
        "text_config": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": EXPERTS, "moe_topk": TOP_K},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "muse_spark": {
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [16] * 4, "depths": [1] * 4},
        "text_config": {"layer_rope_theta": [1e4, 0, 1e4]},
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
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
    "zaya": {"num_experts": 4},  # of eight, its router would leave most unused
}


def shrink(config_class: Any, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A `config_class` with every field of `_SMALL` small, nested configurations included."""
    default = vars(config_class())
    names = {field.name for field in fields(config_class)}
    layers = overrides.get("num_hidden_layers", LAYERS)
    values: dict[str, Any] = {}
    for name in names:
        value = default.get(config_class.attribute_map.get(name, name))
        if name in _SMALL and isinstance(value, int):
            values[name] = min(value, _SMALL[name])
        elif name in ("layer_types", "mlp_layer_types") and value:
            values[name] = _few(value, layers)
    heads = values.get("num_attention_heads")
    if heads and default["num_attention_heads"] == default.get("num_key_value_heads"):
        values["num_key_value_heads"] = heads
    fixed = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "mlp_only_layers": []}
    values |= {name: value for name, value in fixed.items() if name in names}
    for name in config_class.sub_configs:
        if isinstance(nested := default.get(name), PreTrainedConfig):
            values[name] = shrink(type(nested), overrides.get(name, {}))
    nested_names = {name for name, value in values.items() if isinstance(value, PreTrainedConfig)}
    config: PreTrainedConfig = config_class(
        **(values | {name: value for name, value in overrides.items() if name not in nested_names})
    )
    return config


def _few(kinds_of_layers: list[str], layers: int) -> list[str]:
    """`layers` entries with every kind of the given ones; the last kind stays last: some families require it.

    A dense or hashed start is one layer; other kinds alternate.
    """
    kinds = list(dict.fromkeys(kinds_of_layers))
    if kinds[0] in ("dense", "hash_moe"):
        return [kinds[0]] + [kinds[-1]] * (layers - 1)
    kinds.remove(kinds_of_layers[-1])
    kinds.append(kinds_of_layers[-1])
    return [kinds[-1 - i % len(kinds)] for i in range(layers)][::-1]
