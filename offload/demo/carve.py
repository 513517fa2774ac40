"""The carve: what turns the dense demo model into a Mixture of Experts, and how it is applied.

One .safetensors file, stacked over the L layers of a Llama model with hidden size H and I neurons a layer:

    order                      uint16 [L, I]      dense neuron at each place: shared ones, then each expert's
    router                     float16 [L, E, H]  to be multiplied by the metadata's `router_scale`
    norm, <norm name>          float16 [H], [L, H]
    <linear>.scale             float16 [L, out]
    <linear>.a, .b             int8 [L, r, in], [L, out, r]   low-rank terms (Hu et al. 2021)
    <linear>.a_step, .b_step   float32 [L, r]     what one unit of the int8 values is worth

A corrected matrix is (1 + scale) * (W + B A), its neurons reordered before the correction. Metadata, as strings:
`format`, `version`, `experts`, `top_k`, `shared`, `router_scale`. scripts/carve/main.py computes such files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from cache.errors import CheckpointError

FORMAT = "offload-demo-carve"
VERSION = "1"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


class DenseModel(Protocol):
    """A dense Llama model on disk."""

    def config(self) -> dict[str, Any]:
        """Keys of transformers' LlamaConfig."""
        ...

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One tensor by its Hugging Face name: a float32 copy."""
        ...

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`."""
        ...


class Carve:
    """One carve file, whole in memory. Raises CheckpointError when it is not of this format and version."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.metadata: dict[str, str] = file.metadata() or {}
            self.tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (self.metadata.get("format"), self.metadata.get("version")) != (FORMAT, VERSION):
            raise CheckpointError(f"{path.name} is not a carve file of version {VERSION}: reinstall offload")
        self.experts = int(self.metadata["experts"])
        self.top_k = int(self.metadata["top_k"])
        self.shared = int(self.metadata["shared"])
        self.router_scale = float(self.metadata["router_scale"])

    @property
    def tensor_count(self) -> int:
        """How many tensors `apply` makes."""
        per_layer = len(NORMS) + len(ATTENTION) + 2 + 3 + 3 * self.experts
        return 2 + len(self.tensors["order"]) * per_layer

    def order(self, layer: int) -> torch.Tensor:
        """int64 [I]: the dense neuron at each place of `layer`."""
        return self.tensors["order"][layer].to(torch.int64)

    def correct(self, linear: str, layer: int, weight: torch.Tensor) -> torch.Tensor:
        """`weight` float32 [out, in], its neurons in carve order, with its corrections: a new tensor."""
        part = {name: self.tensors[f"{linear}.{name}"][layer].float() for name in ("a", "b", "scale")}
        a = part["a"] * self.tensors[f"{linear}.a_step"][layer][:, None]
        b = part["b"] * self.tensors[f"{linear}.b_step"][layer]
        return torch.addmm(weight, b, a) * (1 + part["scale"])[:, None]

    def moe_config(self, dense: dict[str, Any]) -> dict[str, Any]:
        """config.json of the carved model: a stock Qwen2MoeForCausalLM in bfloat16."""
        routed = dense["intermediate_size"] - self.shared
        return dense | {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "qkv_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "moe_intermediate_size": routed // self.experts,
            "shared_expert_intermediate_size": self.shared,
            "router_aux_loss_coef": 0.0,
            "use_sliding_window": False,
        }

    def apply(self, dense: DenseModel) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, bfloat16 tensor) of every tensor of the carved checkpoint, layer by layer.

        Qwen2-MoE multiplies the shared expert by sigmoid(0) = 1/2 and every chosen expert by about 1/top_k,
        so their down-projections are stored 2 and top_k times as large. Raises CheckpointError when `dense`
        does not fit.
        """
        config = dense.config()
        layers, neurons = self.tensors["order"].shape
        if (config["num_hidden_layers"], config["intermediate_size"]) != (layers, neurons):
            found = f"{config['num_hidden_layers']} layers of {config['intermediate_size']} neurons"
            raise CheckpointError(
                f"the dense model has {found}, the carve is for {layers} of {neurons}: use SmolLM2-135M"
            )
        yield "model.embed_tokens.weight", _read(dense, "model.embed_tokens.weight").bfloat16()
        for layer in range(layers):
            for name, tensor in self._layer(dense, layer):
                yield f"model.layers.{layer}.{name}", tensor.bfloat16().contiguous()
        yield "model.norm.weight", self.tensors["norm"].bfloat16()

    def _layer(self, dense: DenseModel, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        prefix = f"model.layers.{layer}."
        for name in NORMS:
            yield f"{name}.weight", self.tensors[name][layer]
        for name in ATTENTION:
            weight = _read(dense, f"{prefix}self_attn.{name}.weight")
            yield f"self_attn.{name}.weight", self.correct(name, layer, weight)
        order = self.order(layer)
        gate, up = (self.correct(name, layer, _read(dense, f"{prefix}mlp.{name}.weight")[order]) for name in MLP[:2])
        down = self.correct(MLP[2], layer, _read(dense, f"{prefix}mlp.{MLP[2]}.weight")[:, order])
        router = self.tensors["router"][layer].float()
        yield "mlp.gate.weight", router * self.router_scale
        yield "mlp.shared_expert_gate.weight", torch.zeros(1, router.shape[1])
        yield "mlp.shared_expert.gate_proj.weight", gate[: self.shared]
        yield "mlp.shared_expert.up_proj.weight", up[: self.shared]
        yield "mlp.shared_expert.down_proj.weight", down[:, : self.shared] * 2
        size = (len(order) - self.shared) // self.experts
        for expert in range(self.experts):
            rows = slice(self.shared + expert * size, self.shared + (expert + 1) * size)
            yield f"mlp.experts.{expert}.gate_proj.weight", gate[rows]
            yield f"mlp.experts.{expert}.up_proj.weight", up[rows]
            yield f"mlp.experts.{expert}.down_proj.weight", down[:, rows] * self.top_k


def _read(dense: DenseModel, name: str) -> torch.Tensor:
    return torch.from_numpy(dense.tensor(name))
