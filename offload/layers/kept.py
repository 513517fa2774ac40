"""Modules and parameters whose addresses a kernel keeps: whether they still are where they were."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class Kept:
    """Every parameter and every module that these modules themselves have now. The parameters' memory stays while this
    does."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._children = [(each._modules, name, child) for each in modules for name, child in each._modules.items()]
        self._all = [
            (module._parameters, name, parameter, parameter.data_ptr(), parameter.detach())
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def holds(self) -> bool:
        """Whether nobody has given a module another one, or another parameter, or a parameter other memory."""
        for children, name, child in self._children:
            if children.get(name) is not child:
                return False
        for parameters, name, parameter, address, _ in self._all:
            if parameters.get(name) is not parameter or parameter.data_ptr() != address:
                return False
        return True
