"""The text of a class is its own, and several threads may ask for it at once."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from families import families
from torch import nn

from offload.layers.source import class_code, forward_code, function_code


class Alone(nn.Module):
    """
    Text at the margin is a part of it.
    """

    def forward(self) -> str:
        return "alone"


class OnTop(Alone):
    def forward(self) -> str:
        return "on top"


def test_it_is_the_class_and_what_it_is_made_from() -> None:
    assert class_code(OnTop) == inspect.getsource(OnTop) + inspect.getsource(Alone)


class Doubles(nn.Module):
    def forward(self, x: Any) -> Any:
        """Its documentation does nothing."""
        x.mul_(2)
        return x


def test_what_is_done_in_place_is_code() -> None:
    assert forward_code(Doubles) == "x.mul_(2)\nreturn x"
    assert function_code(Doubles.forward) == "def forward(self, x):\n    x.mul_(2)\n    return x"


def test_a_class_whose_name_is_taken_twice_has_none() -> None:
    def make(word: str) -> type[nn.Module]:
        if word:

            class Twice(nn.Module):
                pass

            return Twice

        class Twice(nn.Module):  # type: ignore[no-redef]
            pass

        return Twice

    assert class_code(make("x")) is class_code(make("")) is None


def test_threads_may_ask_at_once() -> None:
    """`inspect.getsource` fails here, on Python 3.11."""
    classes = [
        families()[name].model_class for name in ("qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "nemotron_h")
    ]
    class_code.cache_clear()
    with ThreadPoolExecutor(5) as threads:
        found = list(threads.map(class_code, classes))
    for cls, code in zip(classes, found, strict=True):
        assert code is not None and code.startswith(f"class {cls.__name__}(")
