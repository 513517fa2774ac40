"""Which decoder layers get what the one before gave, with nothing between: what a model does with them, by its code.

Such a layer waits itself for what its kernel reads. So the one before may return while its experts are being computed.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules

from offload.layers.source import forward_code

_LAYERS = {"self.layers", "self.layers[:self.config.num_hidden_layers]"}
_HOOKS = torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks


def chains(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of layers in `model` that are called one after the other so."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        cls: Any = type(module)
        if isinstance(layers, nn.ModuleList) and _hands_on(cls):
            yield layers


class Following:
    """The layer after another one in a list that is a chain."""

    def __init__(self, layers: nn.ModuleList, index: int) -> None:
        self._layers, self._name = layers, str(index)
        self._layer = layers[index]

    def gets_all_of(self, before: nn.Module) -> bool:
        """Whether it is still there, and nobody else may look at what it gets from the layer before: neither a hook nor
        another `forward`."""
        after = self._layer
        return self._layers._modules.get(self._name) is after and not (
            before._forward_hooks
            or after._forward_pre_hooks
            or "forward" in before.__dict__
            or "forward" in after.__dict__
            or any(_HOOKS)
        )


@functools.cache
def _hands_on(cls: Any) -> bool:
    """Whether `forward` calls the layers in a loop, and does no more with what they give than to hand it on."""
    tree = ast.parse(forward_code(cls) or "")
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For) and "self.layers" in ast.unparse(node.iter)]
    return len(loops) == 1 and _is_chain(loops[0])


def _is_chain(loop: ast.For) -> bool:
    each, layers = loop.target, loop.iter
    if isinstance(each, ast.Tuple) and isinstance(layers, ast.Call) and ast.unparse(layers.func) == "enumerate":
        each, layers = each.elts[-1], layers.args[0]
    if len(loop.body) != 1 or not isinstance(each, ast.Name) or ast.unparse(layers) not in _LAYERS:
        return False
    line = loop.body[0]
    call = line.value if isinstance(line, ast.Assign) else None
    if not isinstance(call, ast.Call) or not call.args or ast.unparse(call.func) != each.id:
        return False
    assert isinstance(line, ast.Assign)
    handed_on = ast.unparse(call.args[0])
    others = [*call.args[1:], *(each.value for each in call.keywords)]
    names = {node.id for other in others for node in ast.walk(other) if isinstance(node, ast.Name)}
    return [ast.unparse(target) for target in line.targets] == [handed_on] and handed_on not in names
