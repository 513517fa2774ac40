"""A model without weights: the class transformers would build, on the meta device, and where its experts are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from cache.errors import ModelError, NotMoEError, UnsupportedFamilyError
from offload.checkpoint.building import build, find_class

_IMPLEMENTATION = "offload-shapes"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")

_OTHER_DESIGNS = {
    "llama4": "its experts all run on inputs scaled by the router, in one batched product",
    "llama4_text": "its experts all run on inputs scaled by the router, in one batched product",
    "dbrx": "its experts' weights are stored flattened, w1/v1/w2 for all experts in one matrix",
    "jetmoe": "its experts are parallel linear layers shared with a mixture of attention heads",
    "doge": "its experts are rows of an embedding table, retrieved by product keys",
    "nllb_moe": "an encoder-decoder whose experts are whole feed-forward modules",
    "switch_transformers": "an encoder-decoder whose experts are whole feed-forward modules",
    "diffusion_gemma": "it generates by block diffusion, not one token after the other",
    "longcat_flash": "its router also picks identity experts, which have no weights",
    "step3p7": "its experts run outside transformers' experts interface",
}


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration from `folder`/config.json.

    Raises UnsupportedFamilyError for a model type transformers does not know, and what transformers does.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedFamilyError(
                f"{folder.name}: the model brings its own code: read it, then pass --trust-remote-code"
            ) from error
        if "does not recognize" not in str(error) and "Unrecognized model" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UnsupportedFamilyError(
            f"{folder.name}: transformers {transformers.__version__} does not know this model: {reason}"
        ) from error


def resolve_dtype(config: Any, dtype: str | torch.dtype, on_disk: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype to compute in. For "auto" what the configuration says, or else that of the weights `on_disk`.

    Raises ModelError for any other name than that of a float type with 16, 32 or 64 bits, ValueError where the
    configuration says one.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        said = getattr(config, "dtype", None)
        if said is not None and said not in _DTYPES:
            raise ValueError(f"{said} is nothing to compute in: pass --dtype bfloat16, float16 or float32")
        return said or on_disk
    chosen = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(dtype)
    chosen = chosen or getattr(torch, dtype, None)
    if chosen not in _DTYPES:
        raise ModelError(f'dtype "{dtype}" is not one of auto, bfloat16, float16, float32')
    return chosen


def build_skeleton(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The causal language model of `config` on the meta device: every module and shape, no memory.

    A forward pass on meta tensors works too: its experts compute shapes alone.
    Raises UnsupportedFamilyError when transformers has no causal language model for it, and what transformers does; and
    RuntimeError where it would take for ever.
    """
    try:
        cls, part = find_class(_auto_class(config), config, trust_remote_code=trust_remote_code)
        model = build(cls, part, dtype, _IMPLEMENTATION)
    except ValueError as error:
        if "experts" in str(error) and "implementation" in str(error):
            raise _other_design(config) from error
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UnsupportedFamilyError(
            f'"{config.model_type}" is not a decoder-only language model: transformers generates nothing with it'
        ) from error
    if model.config.is_encoder_decoder:
        raise UnsupportedFamilyError(
            f'"{config.model_type}" is not run as an encoder-decoder, as is_encoder_decoder in config.json has it'
        )
    return model


def check_experts_implementation(config: Any) -> None:
    """Raises ValueError where `config`, as it was read, asks for a way to compute experts that transformers has not.

    Which of its ways that is does not matter: experts are computed here.
    """
    asked = getattr(config, "_experts_implementation", None)
    known = {None, "eager", *ALL_EXPERTS_FUNCTIONS, *ALL_FP8_EXPERTS_FUNCTIONS}
    if not isinstance(asked, dict) and asked not in known:
        raise ValueError(f"transformers knows no experts implementation {asked!r}")


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The routed-experts modules of `model` by path, in layer order.

    Raises NotMoEError for a dense model and UnsupportedFamilyError, by name and with the reason, for a design that
    does not follow transformers' experts interface.
    """
    config: Any = model.config
    if config.model_type in _OTHER_DESIGNS:
        raise _other_design(config)
    found = {path: module for path, module in model.named_modules() if _follows_contract(module)}
    if not found:
        if any("expert" in type(module).__name__.lower() for module in model.modules()):
            raise _other_design(config)
        raise NotMoEError(
            f'"{config.model_type}" is a dense model: it has no routed experts to offload; run it with transformers'
        )
    return found


def count_experts(module: Any) -> int:
    """How many experts a routed-experts module has."""
    return int(module.down_proj.shape[0])


def expert_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """The per-expert parameters of a routed-experts module: name -> tensor [experts, ...], in registration order."""
    num_experts = count_experts(module)
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2 and parameter.shape[0] == num_experts and name.removesuffix("_bias") in PROJECTIONS
    }


def _auto_class(config: Any) -> Any:
    """A causal language model where there is one; else the model that also sees and hears: text uses a part of it."""
    if (
        type(config) not in AutoModelForCausalLM._model_mapping
        and type(config) in AutoModelForMultimodalLM._model_mapping
    ):
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def _follows_contract(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    down, up = parameters.get("down_proj"), parameters.get("gate_up_proj", parameters.get("up_proj"))
    if down is None or up is None or down.dim() != 3 or up.dim() != 3:
        return False
    # What transformers' decorator leaves on the module says that it dispatches to an experts implementation.
    return hasattr(module, "has_gate")


def _other_design(config: Any) -> UnsupportedFamilyError:
    reason = _OTHER_DESIGNS.get(config.model_type, "its experts do not follow transformers' experts interface")
    return UnsupportedFamilyError(f'the "{config.model_type}" family is not supported: {reason}')


def _forward_of_shapes(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The memory a pass takes, without its arithmetic: every expert's rows at once, as they are held before the sum."""
    rows = hidden_states.new_empty(top_k_index.numel(), hidden_states.shape[-1])
    up = module.gate_up_proj if module.has_gate else module.up_proj
    width = up.shape[-1] if module.is_transposed else up.shape[-2]
    inner = rows.new_empty(rows.shape[0], width)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    result = rows.new_empty(rows.shape)
    del inner
    weighted = result * top_k_weights.reshape(-1, 1)
    in_token_order = torch.empty_like(weighted)
    return in_token_order.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)


ExpertsInterface.register(_IMPLEMENTATION, _forward_of_shapes)
