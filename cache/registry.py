"""Named, interchangeable parts: how eviction policies and predictors are found by name.

A part is a class with a `name`, a frozen dataclass `Params`, and a constructor `(*shape, params)`. Built-in parts
register themselves; anybody else's is named as `my_module:MyClass` and needs no registration. Parameters are written
behind the name: `lfu(reset=True)`.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from cache.errors import PolicyError


@dataclass(frozen=True)
class NoParams:
    """The parameters of a part that has none."""


class Part:
    """Base of everything a registry holds.

    `name` is what users type; a subclass that states none is called by its class name. `params` is an
    instance of `Params`, whose repr is what reports print. Raises ValueError for a model without layers or
    experts.
    """

    name: ClassVar[str]
    Params: ClassVar[type[Any]] = NoParams

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def __init__(self, num_layers: int, num_experts: int, params: Any = None) -> None:
        if num_layers < 1 or num_experts < 1:
            raise ValueError(f"{self.name} for {num_layers} layers of {num_experts} experts")
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.params = self.Params() if params is None else params

    def __repr__(self) -> str:
        return f"{self.name}({self.num_layers}x{self.num_experts}, {self.params})"


_imported: dict[type[Any], str] = {}
"""The user's own parts, and what messages call them."""

P = TypeVar("P", bound=Part)


class Registry(Generic[P]):
    """The known parts of one kind. The first look-up imports `modules`, which register the built-in ones."""

    def __init__(self, kind: str, base: type[P], modules: Sequence[str]) -> None:
        self.kind = kind
        self.base = base
        self._modules = tuple(modules)
        self._classes: dict[str, type[P]] = {}

    def register(self, cls: type[P]) -> type[P]:
        """Class decorator: make `cls` known under `cls.name`. Raises ValueError if that name is taken."""
        if self._classes.setdefault(cls.name, cls) is not cls:
            raise ValueError(f'the {self.kind} name "{cls.name}" is taken by {self._classes[cls.name].__qualname__}')
        return cls

    def names(self) -> tuple[str, ...]:
        """Every registered name, sorted."""
        for module in self._modules:
            importlib.import_module(module)
        return tuple(sorted(self._classes))

    def find(self, spec: str) -> type[P]:
        """The class named by `spec`: a registered name, or `my_module:MyClass`; parameters behind it are left alone.

        Side effect: imports `my_module`, from Python's path or the working directory. Raises PolicyError when
        there is no such part or it cannot be imported.
        """
        known = self.names()
        name = spec.partition("(")[0].strip()
        if ":" in name:
            return self._import(name)
        if name not in self._classes:
            raise PolicyError(
                f'no {self.kind} is called "{name}": choose one of {", ".join(known)}, '
                "or name your own as my_module:MyClass"
            )
        return self._classes[name]

    def make(self, spec: str, *shape: Any) -> P:
        """A new part as `spec` says: a name, or a name and fields of its `Params`, as in `lfu(reset=True)`.

        `shape` is what its constructor takes before the parameters. Raises PolicyError as `find` does, and for
        parameters that the part does not have.
        """
        cls = self.find(spec)
        try:
            chosen = cls.Params(**_parameters(spec, cls.Params))
        except (TypeError, ValueError) as error:
            raise PolicyError(f'{self.kind} "{spec}" cannot take these parameters: {error}') from error
        make: Callable[..., P] = cls  # every kind of part takes a shape of its own
        return make(*shape, chosen)

    def _import(self, spec: str) -> type[P]:
        module_name, _, class_name = spec.partition(":")
        # Console scripts do not search the working directory; it comes last, so that it can shadow nothing.
        here = str(Path.cwd())
        searched = here in sys.path
        if not searched:
            sys.path.append(here)
        try:
            cls = getattr(importlib.import_module(module_name), class_name)
        except Exception as error:  # the user's own module may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise PolicyError(f'cannot load {self.kind} "{spec}": {reason}') from error
        finally:
            if not searched:
                sys.path.remove(here)
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise PolicyError(f'"{spec}" is not a subclass of {self.base.__module__}.{self.base.__name__}')
        missing = sorted(getattr(cls, "__abstractmethods__", ()))
        if missing:
            raise PolicyError(f'{self.kind} "{spec}" does not define {", ".join(missing)}')
        _imported[cls] = f'{self.kind} "{spec}"'
        return cls


def imported_as(kind: type[Any] | None) -> str | None:
    """What messages call the class `kind`, if it is a part of the user's own."""
    return None if kind is None else _imported.get(kind)


def _parameters(spec: str, kind: type[Any]) -> dict[str, Any]:
    """The keyword arguments written in `spec`. Raises ValueError if they are not plain values with names that `kind`, a
    dataclass, has."""
    if "(" not in spec:
        return {}
    try:
        call = ast.parse("_" + spec[spec.index("(") :].strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        if any(word.arg is None for word in call.keywords):
            raise ValueError
        given = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError("write them as name(key=value, key=value)") from None
    known = [field.name for field in fields(kind)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"it has {', '.join(known)}, not {', '.join(unknown)}" if known else "it takes no parameters")
    return given
