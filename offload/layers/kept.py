"""Parameters whose addresses a kernel keeps: whether they still are where they were."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class Kept:
    """Every parameter that these modules themselves have now. Their memory stays while this does."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._all = [
            (module._parameters, name, parameter, parameter.data_ptr(), parameter.detach())
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def holds(self) -> bool:
        """Whether nobody has given a module another parameter, or a parameter other memory."""
        for parameters, name, parameter, address, _ in self._all:
            if parameters.get(name) is not parameter or parameter.data_ptr() != address:
                return False
        return True
