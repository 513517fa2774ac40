"""A router's product with one token by our kernel, for models that need not be exact.

Routers are classes of each family that call `linear(hidden_states, self.weight)`. So the weight knows its product.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offload.checkpoint.layout import ExpertMap
from offload.formats.cpu import native
from offload.formats.cpu.plain import products, serves
from offload.layers.autocast import autocasts
from offload.layers.router import router_beside
from offload.layers.source import class_code

_CALLS = re.compile(r"\blinear\([\w.() ]*, self\.weight\)")


class RouterWeight(nn.Parameter):
    """A matrix [E, H] in host memory whose products with rows of its own dtype are our kernel's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Anything but that product is done as with any parameter."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is functional.linear and len(args) == 2 and not kwargs and _takes(*args):
                x, weight = args
                y = products(x.reshape(-1, x.shape[-1]), [weight])
                return y.view(*x.shape[:-1], len(weight))
            return func(*args, **(kwargs or {}))


def use_router_products(model: nn.Module, experts: ExpertMap) -> None:
    """Let the routers of `model` that lie in host memory, and that a kernel serves, multiply so."""
    if not native.level():
        return
    for layer in experts.layers:
        _, router = router_beside(model, layer)
        weight = None if router is None else getattr(router, "weight", None)
        if (
            router is not None
            and type(weight) is nn.Parameter
            and weight.device.type == "cpu"
            and weight.dim() == 2
            and serves(weight.dtype, weight.shape[1])
            and _calls(router)
        ):
            router.weight = RouterWeight(weight.data, requires_grad=weight.requires_grad)


def _takes(x: Any, weight: Any) -> bool:
    return (
        isinstance(x, torch.Tensor)
        and isinstance(weight, RouterWeight)
        and x.dtype == weight.dtype
        and x.device == weight.device
        and not autocasts(x)
    )


def _calls(router: nn.Module) -> bool:
    cls: Any = type(router)
    return _CALLS.search(class_code(cls) or "") is not None
