"""A tiny random model of every Mixture-of-Experts language model family that transformers ships.

Families are discovered, not listed: each generative class of transformers' auto mappings whose source builds
routed experts, shrunk from its own default configuration. `python tests/families.py` builds them all and
prints what each is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

VOCAB = 256
PAD, BOS, EOS = 0, 1, 2
# As in the table below. Sums of two numbers would come out alike in any order and precision.
_LAYERS, _EXPERTS, _TOP_K = 3, 8, 3

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
_ROUTED: dict[str, Any] = {"num_experts_per_tok": _TOP_K, "n_group": 4, "topk_group": 2}
_GEMMA: dict[str, Any] = {
    "num_experts": _EXPERTS,
    "top_k_experts": _TOP_K,
    "moe_intermediate_size": 32,
    "global_head_dim": 16,
}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": _TOP_K, "moe_num_experts": _EXPERTS},
    },
    "deepseek_ocr2": {
        "text_config": {"num_experts_per_tok": _TOP_K, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        "vision_config": {"sam_config": {"downsample_channels": [32, 64]}},
    },
    "deepseek_v2": {**_ROUTED, "topk_method": "group_limited_greedy"},
    "diffusion_gemma": {"text_config": _GEMMA},
    "doge": {"is_moe": True},
    "dots1": {**_ROUTED, "n_routed_experts": _EXPERTS, "n_shared_experts": 1},
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
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": _EXPERTS, "moe_topk": _TOP_K},
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

OTHER_DESIGN: dict[str, str] = {
    "dbrx": "the weights of all experts are one flattened matrix",
    "diffusion_gemma": "generates by block diffusion, not token after token",
    "doge": "experts are rows of an embedding table",
    "jetmoe": "attention heads are experts too, in a layer of its own",
    "llama4_text": "every expert runs on every routed input in one batched product",
    "longcat_flash": "some experts are the identity; not dispatched through the experts interface",
    "nllb-moe": "an encoder-decoder with a whole feed-forward module for each expert",
    "step3p7": "not dispatched through the experts interface",
    "switch_transformers": "an encoder-decoder with a whole feed-forward module for each expert",
}
"""Families that may be refused, and what sets them apart from transformers' common experts interface."""


@dataclass(frozen=True)
class Family:
    """One architecture: `name` is its configuration's model type, `class_name` its class in transformers.

    `text_only` tells a causal language model from one that also takes images or sound.
    """

    name: str
    class_name: str
    text_only: bool

    @property
    def model_class(self) -> Any:
        """The class in transformers; imports its module."""
        return getattr(transformers, self.class_name)

    @property
    def may_be_refused(self) -> bool:
        """Whether the family is outside of what every offloading runtime for transformers must serve."""
        return self.name in OTHER_DESIGN or not self.text_only

    def config(self, **overrides: Any) -> PreTrainedConfig:
        """64 wide, about three layers, two or more of them with eight experts, of which up to three are chosen."""
        return _shrink(self.model_class.config_class, _OVERRIDES.get(self.name, {}) | overrides)

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """A model with seeded random weights in `dtype`.

        No tensor stays at zeros or ones: biases, norm scales and the routers' correction biases are random.
        """
        torch.manual_seed(seed)
        model: PreTrainedModel = self.model_class._from_config(self.config(**overrides), dtype=dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        saved = model.state_dict().keys()
        for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
            if name in saved:
                _randomise(name, tensor.data, generator)
        return model

    def save(self, folder: Path, dtype: torch.dtype, shard_size: str = "5GB", **overrides: Any) -> None:
        """Write `build` to `folder` as transformers does, in the family's own layout on disk."""
        self.build(dtype, **overrides).save_pretrained(folder, max_shard_size=shard_size)

    def resident(self, folder: Path, dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
        """The checkpoint in `folder`, loaded whole by transformers: what offloading must equal, bit for bit.

        Weights move to memory of their own: in a mapped file they are aligned to 8 bytes only, which alone
        changes the last bits of a product.
        """
        model: PreTrainedModel = self.model_class.from_pretrained(folder, dtype=dtype, **kwargs).eval()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        for module in routed_experts(model):
            if hasattr(module, "has_gate") and module.config._experts_implementation != "grouped_mm":
                raise ValueError(f"{self.name}: experts run as {module.config._experts_implementation}")
        return model


def _randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random values of the size that trained ones have; routers are sharp, so that tokens take different experts."""
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("tid2eid"):  # which experts each token id takes, where a table says so
        tensor.copy_(torch.rand(len(tensor), _EXPERTS, generator=generator).argsort()[:, : tensor.shape[1]])
    elif not tensor.is_floating_point() or re.search("slope_rate|_decay$", name):
        return  # the latter say how fast a state fades; at random rates it would grow for ever
    elif re.search("(correction|balancing|expert)_bias", name):
        tensor.add_((0.02 * noise).to(tensor.dtype))
    elif tensor.dim() >= 2:
        gain = 3 if re.search(r"router|\.gate\.", name) else 1
        tensor.copy_(gain * noise * tensor.shape[-1] ** -0.5)
    else:
        tensor.add_((0.1 * noise).to(tensor.dtype))


def routed_experts(model: torch.nn.Module) -> list[Any]:
    """The modules of `model` that hold the weights of routed experts, in order."""
    return [module for module in model.modules() if _experts_of(module)]


def expert_sizes(model: torch.nn.Module) -> list[int]:
    """Bytes of every routed expert of `model`, without the parameters that the experts of a layer share."""
    sizes: list[int] = []
    for module in routed_experts(model):
        experts = _experts_of(module)
        nbytes = sum(p.nbytes for p in module.parameters(recurse=False) if p.dim() >= 2)
        sizes += [nbytes // experts] * experts
    return sizes


def _experts_of(module: Any) -> int:
    """How many experts' weights are parameters of `module` itself; 0 for any other module."""
    own = dict(module.named_parameters(recurse=False))
    if "down_proj" in own and own["down_proj"].dim() == 3:
        return int(own["down_proj"].shape[0])
    return int(module.moe_num_experts) if "w1" in own and "v1" in own else 0


@functools.cache
def families() -> dict[str, Family]:
    """Every family of transformers' auto mappings that generates text and has routed experts, by name.

    A model that also sees or hears is left out where its language model is a class of its own. Imports no
    modeling code.
    """
    language = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    other = {
        **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    found: dict[str, Family] = {}
    modules: set[str] = set()
    for mapping in (language, other):
        # Some classes have several model types, the composite one first and that of the language model last.
        names = {class_name: name for name, class_name in mapping.items()}
        for class_name, name in names.items():
            module = transformers._class_to_module.get(class_name)
            if module is None or (mapping is other and module in modules) or not _has_experts(module):
                continue
            # The causal mapping names some classes that also see; their language model is there as well.
            if mapping is language and "Conditional" in class_name:
                continue
            modules.add(module)
            found[name] = Family(name, class_name, text_only=class_name.endswith("ForCausalLM"))
    return found


def _has_experts(module: str) -> bool:
    path = Path(transformers.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    return bool(re.search(r"\bself\.(experts|num_experts)\b|[Ee]xperts\(|MoE\(", source))


def _shrink(config_class: Any, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A `config_class` with every field of `_SMALL` small, nested configurations included."""
    default = vars(config_class())
    names = {field.name for field in fields(config_class)}
    layers = overrides.get("num_hidden_layers", _LAYERS)
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
            values[name] = _shrink(type(nested), overrides.get(name, {}))
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


def describe(model: torch.nn.Module) -> str:
    """One line: how many experts there are, and what sets their module apart."""
    modules = routed_experts(model)
    first = modules[0]
    flags = [flag for flag in ("has_bias", "is_transposed", "has_post_expert_norm") if getattr(first, flag)]
    flags += [] if first.has_gate else ["no gate"]
    flags += [] if first.is_concatenated else ["interleaved"]
    return ", ".join([f"{len(modules)} MoE layers", f"{len(expert_sizes(model))} experts", *flags])


def main() -> None:
    """Build every family; print those that follow the experts interface, then the others with the reason."""
    logging.set_verbosity_error()
    served = [family for family in families().values() if family.name not in OTHER_DESIGN]
    for family in served:
        kind = "text" if family.text_only else "text, and images or sound"
        print(f"{family.name}: {describe(family.build())}; {kind}")
    print(f"{len(served)} families follow the experts interface, {len(OTHER_DESIGN)} have another design:")
    for name, reason in OTHER_DESIGN.items():
        print(f"{name}: {reason}")


if __name__ == "__main__":
    main()
