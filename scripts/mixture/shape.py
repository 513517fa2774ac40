"""The two models: their stock classes, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """A Qwen3-MoE, or with `experts` 0 a dense Qwen3 whose MLP is as wide as all that a token's experts have."""

    vocabulary: int = 4096
    hidden: int = 192
    layers: int = 12
    heads: int = 3
    kv_heads: int = 1
    head_size: int = 64
    experts: int = 32
    top_k: int = 4
    inner: int = 32  # of one expert
    positions: int = 2048
    balance: float = 0.01  # weight of the load-balancing loss

    def config(self) -> Any:
        """The stock class' configuration. Token 0 begins and ends every text."""
        from transformers import Qwen3Config, Qwen3MoeConfig

        both = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.top_k * self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
        }
        if not self.experts:
            return Qwen3Config(**both)
        return Qwen3MoeConfig(
            **both,
            moe_intermediate_size=self.inner,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            router_aux_loss_coef=self.balance,
        )

    def build(self, seed: int) -> Any:
        """A stock model with new weights, float32, that `seed` fixes."""
        from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

        torch.manual_seed(seed)
        model = (Qwen3MoeForCausalLM if self.experts else Qwen3ForCausalLM)(self.config())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):  # what is added layer by layer
                    weight.mul_((2 * self.layers) ** -0.5)
        return model.float()

    def parameters(self) -> tuple[int, int]:
        """(all, those that a token is multiplied with) of the matrices, the tied embedding once."""
        heads = (2 * self.heads + 2 * self.kv_heads) * self.head_size
        expert = 3 * self.hidden * self.inner
        always = self.vocabulary * self.hidden + self.layers * self.hidden * (heads + self.experts)
        return always + self.layers * max(self.experts, self.top_k) * expert, always + self.layers * self.top_k * expert
