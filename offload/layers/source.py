"""The source text of classes, which says what a model does with a layer."""

from __future__ import annotations

import functools
import inspect
import re
import sys

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
