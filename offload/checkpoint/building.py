"""A model without weights, built so that no other thread notices: transformers' way sets torch's type for all of them.

While transformers builds a model, new tensors have the model's type in the whole process, and ties are switched off for
every model. Here a mode of torch gives this thread alone the type, as `torch.device` gives it the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module, resolve_trust_remote_code
from transformers.models.auto.auto_factory import _get_model_class, add_generation_mixin_to_remote_model

_SAYS_ITS_TYPE = {"float", "double", "half", "bfloat16"}
_MOST_STEPS = 300_000
"""Of building a model: more than a thousand layers take."""
_TIE_WEIGHTS = PreTrainedModel.tie_weights


def find_class(auto_class: Any, config: Any, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """The class that `auto_class` has for `config`, and the configuration it is built from, which may be a part.

    Raises ValueError, as transformers does, where there is none, or only in code that is not trusted.
    """
    mapping = auto_class._model_mapping
    known = type(config) in mapping
    reference = getattr(config, "auto_map", None) or {}
    if auto_class.__name__ in reference:
        reference = reference[auto_class.__name__]
        source, _, reference = reference.rpartition("--")
        trusted = resolve_trust_remote_code(
            trust_remote_code, config._name_or_path, known, True, upstream_repo=source or None
        )
        if trusted and not (known and not _get_model_class(config, mapping).__module__.startswith("transformers.")):
            brought = get_class_from_dynamic_module(reference, source or config.name_or_path)
            brought.register_for_auto_class(auto_class=auto_class)
            return add_generation_mixin_to_remote_model(brought), config
    if not known:
        raise ValueError(f"Unrecognized configuration class {type(config)}")
    found = _get_model_class(config, mapping)
    part = config.sub_configs.get("text_config")
    if part is not None and getattr(found, "config_class", None) == part:
        return found, config.get_text_config()
    return found, config


def build(cls: Any, config: Any, dtype: torch.dtype, experts_implementation: str) -> Any:
    """A model of `cls` on the meta device, its parameters in `dtype`.

    Side effect: `config` says the same dtype and implementation, as after transformers' own. Raises what transformers
    does, and RuntimeError where it would take for ever.
    """
    config.dtype = dtype
    for name in config.sub_configs:
        if (part := getattr(config, name)) is not None:
            part.dtype = dtype
    config._experts_implementation = experts_implementation
    with torch.device("meta"), _InThisThread(dtype):
        model = cls(config).eval()
    tie(model)
    return model


def tie(model: Any, missing: set[str] | None = None) -> None:
    """Let parameters share their weights as the model's family says; of those `missing`, what is tied no longer is.

    While another thread builds a model with transformers, `tie_weights` does nothing there.
    """
    if type(model).tie_weights is PreTrainedModel.tie_weights:
        _TIE_WEIGHTS(model, missing_keys=missing, recompute_mapping=False)
    else:
        model.tie_weights(missing_keys=missing, recompute_mapping=False)


class _InThisThread(TorchFunctionMode):
    """While active, `dtype` is the type of floats where no argument says which: what torch's default type would do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._steps = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise RuntimeError(f"building it takes more than {_MOST_STEPS:,} steps, as thousands of layers would")
        kwargs = dict(kwargs or {})
        if func is torch.linspace:  # code that was written before models were built on meta asks for its values
            kwargs.setdefault("device", "cpu")
        result = func(*args, **kwargs)
        if not (isinstance(result, torch.Tensor) and result.is_floating_point()) or _says_type(func, args, kwargs):
            return result
        if func in _device_constructors():
            return func(*args, **{**kwargs, "dtype": self._dtype})
        return result.to(self._dtype)


def _says_type(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return getattr(func, "__name__", "") in _SAYS_ITS_TYPE or any(
        isinstance(leaf, (torch.dtype, np.ndarray, np.generic))
        or (isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
        for leaf in tree_leaves((args, dict(kwargs)))
    )
