"""What a transformers model can do and an offloaded one cannot, and why."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

_ON_DISK = "its experts are on disk and in no state dict; the checkpoint it was loaded from is whole"
_ADAPTERS = "adapters (PEFT) are not served: its experts are in no parameter that one could stand beside"
TRAINING = "its experts are computed without gradients: train the model with transformers"
_FIXED = "the memory plan holds for the model as it was loaded: change the checkpoint with transformers, and load that"
PLACED = "the memory plan says where weights are: open the model again with another `device` or `dtype`"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("state_dict", "load_state_dict", "save_pretrained", "push_to_hub"), _ON_DISK),
    **dict.fromkeys(
        ("add_adapter", "load_adapter", "set_adapter", "delete_adapter", "enable_adapters", "disable_adapters"),
        _ADAPTERS,
    ),
    **dict.fromkeys(("active_adapters", "get_adapter_state_dict", "enable_peft_hotswap"), _ADAPTERS),
    **dict.fromkeys(("modules", "named_modules"), f"{_ADAPTERS}; what is resident is in model.module.named_modules()"),
    **dict.fromkeys(("gradient_checkpointing_enable", "enable_input_require_grads", "zero_grad"), TRAINING),
    **dict.fromkeys(("resize_token_embeddings", "resize_position_embeddings", "set_input_embeddings"), _FIXED),
    **dict.fromkeys(("set_output_embeddings", "set_decoder", "set_submodule", "set_experts_implementation"), _FIXED),
    **dict.fromkeys(("apply", "init_weights", "initialize_weights", "dequantize", "compile"), _FIXED),
    **dict.fromkeys(("xpu", "ipu", "mtia", "to_empty", "type", "share_memory"), PLACED),
}
"""By the name in transformers."""


def refuse(name: str, why: str) -> NoReturn:
    """Raises NotImplementedError, which says so."""
    raise NotImplementedError(f"OffloadedModel.{name}: {why}")


def guard(module: Any) -> None:
    """Let the transformers model `module`, which has no experts, write no checkpoint: it would lack them."""
    for name in ("save_pretrained", "push_to_hub"):
        setattr(module, name, partial(_refused, name))


def _refused(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    refuse(name, REFUSED[name])
