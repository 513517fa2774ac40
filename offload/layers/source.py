"""The source text of classes, which says what a model does with a layer."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@functools.cache
def class_code(cls: type[nn.Module]) -> str | None:
    """The source of a module's class and of those it is made from; None where it cannot be had."""
    known = set(nn.Module.__mro__) | set(PreTrainedModel.__mro__)
    try:
        return "".join(_source(each) for each in cls.__mro__ if each not in known)
    except (OSError, TypeError, KeyError):
        return None


@functools.cache
def forward_code(cls: Any) -> str | None:
    """What the `forward` of a module's class does, its documentation left out; None where it cannot be had."""
    code = class_code(cls)
    for node in ast.walk(ast.parse(textwrap.dedent(code or ""))):
        if isinstance(node, ast.FunctionDef) and node.name == "forward":
            return body_code(node)
    return None


@functools.cache
def function_code(function: Any) -> str:
    """A function's code without types and documentation; empty where it cannot be had."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    except (OSError, TypeError, SyntaxError):
        return ""
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list, tree.returns = [], None
    for argument in tree.args.args:
        argument.annotation = None
    tree.body = [line for line in tree.body if not _is_documentation(line)]
    return ast.unparse(tree)


def body_code(function: ast.FunctionDef) -> str:
    """A function's lines as `ast.unparse` writes them, its documentation left out."""
    return "\n".join(ast.unparse(line) for line in function.body if not _is_documentation(line))


def _is_documentation(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def _source(cls: type) -> str:
    """Raises OSError where there is none, or more than one class of this name.

    `inspect.getsource` parses the whole file for it, and Python 3.11 fails where two threads parse at once.
    """
    lines, _ = inspect.findsource(sys.modules[cls.__module__])
    begins = re.compile(rf"\s*class {re.escape(cls.__name__)}\b")
    found = [number for number, line in enumerate(lines) if begins.match(line)]
    if len(found) != 1:
        raise OSError(f"{cls.__module__} does not say what {cls.__name__} is")
    return "".join(inspect.getblock(lines[found[0] :]))
