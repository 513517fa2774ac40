"""What code written for a transformers model asks of it beside `generate` and `forward`, and what ours answers.

Questions are answered as the resident model answers them. What would move, change, train or save the weights is refused
with the reason, since most of them are on disk, in no parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from offload.assembly.assemble import Assembly
from offload.assembly.refusals import PLACED, REFUSED, TRAINING, refuse
from offload.checkpoint.skeleton import build_skeleton
from offload.system.sizes import format_bytes

_Self = TypeVar("_Self", bound="AsTransformers")

# By these names a pipeline tells which models are for it. It reports others as an error, and runs them all the same.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["offload"] = "OffloadedModel"


class AsTransformers:
    """The part of `OffloadedModel` that is like a transformers model at rest. A mixin; what it asks are its `parts`."""

    parts: Assembly

    @property
    def module(self) -> Any:
        """The transformers model inside. Raises RuntimeError if it is closed."""
        if self.closed:
            raise RuntimeError("this OffloadedModel is closed")
        return self.parts.module

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.parts.module is None

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.module.config

    @property
    def generation_config(self) -> Any:
        """The transformers generation defaults; may be changed."""
        return self.module.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.module.generation_config = config

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self.parts.device.torch_device

    @property
    def dtype(self) -> torch.dtype:
        """What hidden states are computed in."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    def name_or_path(self) -> str:
        """The hub id or the folder that it was loaded from."""
        return self.parts.prepared.source.name

    @property
    def hf_device_map(self) -> dict[str, torch.device | str]:
        """Where modules are, as accelerate says it: the experts' on "disk", whatever is cached; all others resident."""
        return {"": self.device} | {layer.path: "disk" for layer in self.parts.experts.layers}

    @property
    def main_input_name(self) -> str:
        """As the model inside."""
        name: str = self.module.main_input_name
        return name

    @property
    def input_modalities(self) -> Any:
        """As the model inside."""
        return self.module.input_modalities

    @property
    def output_modalities(self) -> Any:
        """As the model inside."""
        return self.module.output_modalities

    @property
    def training(self) -> bool:
        """Never."""
        return False

    def can_generate(self) -> bool:
        """Whether it generates text: as the model inside."""
        return bool(self.module.can_generate())

    def _supports_logits_to_keep(self) -> bool:
        """What transformers asks of a model that assists another."""
        return bool(self.module._supports_logits_to_keep())

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns ids into vectors; its weight may be on disk."""
        embeddings: nn.Module = self.module.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The module that makes logits."""
        head: nn.Module = self.module.get_output_embeddings()
        return head

    def compute_transition_scores(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """transformers' log-probabilities of what was generated, from what `generate` returned."""
        scores: torch.Tensor = self.module.compute_transition_scores(*args, **kwargs)
        return scores

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """What `generate` passes to `forward` next: as the model inside."""
        return self.module.prepare_inputs_for_generation(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What is resident: neither the experts' parameters, nor embeddings on disk, nor quantised layers'."""
        return iter(self.module.parameters(recurse))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As `parameters`, with their names."""
        return iter(self.module.named_parameters(*args, **kwargs))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Of the whole model, experts and all, as the resident one counts them."""
        trusted = self.parts.prepared.trust_remote_code
        whole = build_skeleton(deepcopy(self.config), self.dtype, trust_remote_code=trusted)
        return int(whole.num_parameters(only_trainable, exclude_embeddings))

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: what belongs together was tied when it was loaded."""

    def eval(self: _Self) -> _Self:
        """The model itself, which only infers."""
        return self

    def train(self: _Self, mode: bool = True) -> _Self:
        """The model itself for `train(False)`. Raises NotImplementedError for `train()`."""
        return refuse("train", TRAINING) if mode else self

    def requires_grad_(self: _Self, requires_grad: bool = True) -> _Self:
        """The model itself for `requires_grad_(False)`. Raises NotImplementedError otherwise."""
        return refuse("requires_grad_", TRAINING) if requires_grad else self

    def to(self: _Self, *args: Any, **kwargs: Any) -> _Self:
        """The model itself, if that is where and what it is already. Raises NotImplementedError for anything else."""
        here = torch.empty(0, dtype=self.dtype, device=self.device)
        there = here.to(*args, **kwargs)
        if (there.device, there.dtype) != (here.device, here.dtype):
            refuse("to", f"it computes on {here.device} in {here.dtype}, and {PLACED}")
        return self

    def cpu(self: _Self) -> _Self:
        """As `to("cpu")`."""
        return self.to("cpu")

    def cuda(self: _Self, device: int | str | torch.device = "cuda") -> _Self:
        """As `to("cuda")`."""
        return self.to(device)

    def half(self: _Self) -> _Self:
        """As `to(torch.float16)`."""
        return self.to(torch.float16)

    def bfloat16(self: _Self) -> _Self:
        """As `to(torch.bfloat16)`."""
        return self.to(torch.bfloat16)

    def float(self: _Self) -> _Self:
        """As `to(torch.float32)`."""
        return self.to(torch.float32)

    def double(self: _Self) -> _Self:
        """As `to(torch.float64)`."""
        return self.to(torch.float64)

    def __repr__(self) -> str:
        plan = self.parts.prepared.plan
        facts = {"device": plan.device, "dtype": plan.dtype}
        facts["experts"] = ",".join(precision.name for precision in self.parts.store.precisions)
        facts["cpu_mem"] = format_bytes(plan.cpu_mem_bytes)
        if plan.gpu_mem_bytes is not None:
            facts["gpu_mem"] = format_bytes(plan.gpu_mem_bytes)
        said = ", ".join(f"{name}={value!r}" for name, value in facts.items())
        return f"OffloadedModel({self.name_or_path!r}, {said}{', closed' if self.closed else ''})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an OffloadedModel cannot be copied or pickled: it has threads, open files and memory of its own; "
            "open another with OffloadedModel.from_pretrained"
        )

    if not TYPE_CHECKING:  # else every wrong name would be right

        def __getattr__(self, name: str) -> Any:
            if name in REFUSED:
                return lambda *args, **kwargs: refuse(name, REFUSED[name])
            message = f"'{type(self).__name__}' object has no attribute '{name}'"
            parts = vars(self).get("parts")
            if parts is not None and not name.startswith("_") and name in dir(parts.module):
                message += f"; the transformers model inside has it: model.module.{name}"
            raise AttributeError(message, name=name, obj=self)
