"""The true layer shapes of known MoE families, and the tensors that their files on the hub hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BYTES = 2  # of one bfloat16 value


@dataclass(frozen=True)
class Family:
    """One MoE family: the shape of its layers and the fields of its config.json."""

    architecture: str
    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of one expert
    experts: int
    top_k: int
    layers: int
    vocab: int
    config: dict[str, Any]  # everything else that config.json needs
    token_ids: dict[str, Any]  # special tokens, which mean nothing in another vocabulary


@dataclass(frozen=True)
class Tensor:
    """One tensor to write. `fill` says with what: "normal" weights, "ones" (norms), "unit" normal (embeddings)."""

    name: str
    shape: tuple[int, ...]
    fill: str = "normal"

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.values * BYTES


FAMILIES = {
    "qwen3-30b-a3b": Family(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        hidden=2048,
        heads=32,
        kv_heads=4,
        head_dim=128,
        intermediate=768,
        experts=128,
        top_k=8,
        layers=48,
        vocab=151936,
        config={
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "hidden_act": "silu",
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
        },
        token_ids={"bos_token_id": 151643, "eos_token_id": 151645},
    ),
    "mixtral-8x7b": Family(
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=14336,
        experts=8,
        top_k=2,
        layers=32,
        vocab=32000,
        config={
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
        },
        token_ids={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        model_type="olmoe",
        hidden=2048,
        heads=16,
        kv_heads=16,
        head_dim=128,
        intermediate=1024,
        experts=64,
        top_k=8,
        layers=16,
        vocab=50304,
        config={
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        },
        token_ids={"eos_token_id": 50279, "pad_token_id": 1},
    ),
    "gpt-oss-20b": Family(
        architecture="GptOssForCausalLM",
        model_type="gpt_oss",
        hidden=2880,
        heads=64,
        kv_heads=8,
        head_dim=64,
        intermediate=2880,
        experts=32,
        top_k=4,
        layers=24,
        vocab=201088,
        config={
            "attention_bias": True,
            "hidden_act": "silu",
            "initial_context_length": 4096,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
        },
        token_ids={"eos_token_id": 200002, "pad_token_id": 199999},
    ),
}


def config_json(family: Family) -> dict[str, Any]:
    """The config.json of a checkpoint of `family`."""
    expert_count = "num_local_experts" if family.model_type in ("mixtral", "gpt_oss") else "num_experts"
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "hidden_size": family.hidden,
        "num_attention_heads": family.heads,
        "num_key_value_heads": family.kv_heads,
        "head_dim": family.head_dim,
        "intermediate_size": family.intermediate,
        "num_hidden_layers": family.layers,
        expert_count: family.experts,
        "num_experts_per_tok": family.top_k,
        "vocab_size": family.vocab,
        "router_aux_loss_coef": 0.001,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family.model_type == "qwen3_moe":
        config["moe_intermediate_size"] = family.intermediate
    if family.model_type == "gpt_oss":
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [kinds[layer % 2] for layer in range(family.layers)]
    return config | family.config | family.token_ids


def tensors(family: Family) -> Iterator[Tensor]:
    """Every tensor of the checkpoint, in module order: the order in which shards are filled.

    Embeddings are of about unit variance. With small ones the attention's output, an average over the context that
    hardly changes from token to token, would decide the routing, and a few experts would serve every token.
    """
    hidden = family.hidden
    yield Tensor("model.embed_tokens.weight", (family.vocab, hidden), "unit")
    for layer in range(family.layers):
        prefix = f"model.layers.{layer}."
        yield from _attention(family, prefix + "self_attn.")
        yield from _experts(family, prefix)
        yield Tensor(prefix + "input_layernorm.weight", (hidden,), "ones")
        yield Tensor(prefix + "post_attention_layernorm.weight", (hidden,), "ones")
    yield Tensor("model.norm.weight", (hidden,), "ones")
    yield Tensor("lm_head.weight", (family.vocab, hidden))


def _attention(family: Family, prefix: str) -> Iterator[Tensor]:
    queries, keys = family.heads * family.head_dim, family.kv_heads * family.head_dim
    shapes = {
        "q_proj": (queries, family.hidden),
        "k_proj": (keys, family.hidden),
        "v_proj": (keys, family.hidden),
        "o_proj": (family.hidden, queries),
    }
    for name, shape in shapes.items():
        yield Tensor(f"{prefix}{name}.weight", shape)
        if family.config.get("attention_bias"):
            yield Tensor(f"{prefix}{name}.bias", shape[:1])
    if family.model_type == "gpt_oss":
        yield Tensor(prefix + "sinks", (family.heads,))
    elif family.model_type == "qwen3_moe":  # normalises each head
        yield Tensor(prefix + "q_norm.weight", (family.head_dim,), "ones")
        yield Tensor(prefix + "k_norm.weight", (family.head_dim,), "ones")
    elif family.model_type == "olmoe":  # normalises all heads together
        yield Tensor(prefix + "q_norm.weight", (queries,), "ones")
        yield Tensor(prefix + "k_norm.weight", (keys,), "ones")


def _experts(family: Family, prefix: str) -> Iterator[Tensor]:
    experts, hidden, inner = family.experts, family.hidden, family.intermediate
    if family.model_type == "gpt_oss":  # one tensor for all experts, stored transposed
        yield Tensor(prefix + "mlp.router.weight", (experts, hidden))
        yield Tensor(prefix + "mlp.router.bias", (experts,))
        yield Tensor(prefix + "mlp.experts.gate_up_proj", (experts, hidden, 2 * inner))
        yield Tensor(prefix + "mlp.experts.gate_up_proj_bias", (experts, 2 * inner))
        yield Tensor(prefix + "mlp.experts.down_proj", (experts, inner, hidden))
        yield Tensor(prefix + "mlp.experts.down_proj_bias", (experts, hidden))
        return
    block = "block_sparse_moe." if family.model_type == "mixtral" else "mlp."
    gate, up, down = ("w1", "w3", "w2") if family.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    yield Tensor(f"{prefix}{block}gate.weight", (experts, hidden))
    for expert in range(experts):
        yield Tensor(f"{prefix}{block}experts.{expert}.{gate}.weight", (inner, hidden))
        yield Tensor(f"{prefix}{block}experts.{expert}.{up}.weight", (inner, hidden))
        yield Tensor(f"{prefix}{block}experts.{expert}.{down}.weight", (hidden, inner))
