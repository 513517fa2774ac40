"""A model built in this thread alone is the one that transformers builds for the whole process."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from families import families
from transformers import AutoModelForCausalLM

from offload.checkpoint.building import _InThisThread, build, find_class


def layout(model: Any) -> dict[str, Any]:
    """All parameters and buffers but their values, and which are one."""
    parts = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    named = {name: (tuple(t.shape), t.dtype, t.device, t.requires_grad) for name, t in parts}
    return {"class": type(model), "apart": len(list(model.parameters())), "said": model.config.to_dict()} | named


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "deepseek_v3", "qwen3_next", "mixtral", "minimax"])
def test_it_is_the_same_model(name: str, dtype: torch.dtype) -> None:
    config = families()[name].config()
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=dtype, experts_implementation="grouped_mm"
        ).eval()
    cls, part = find_class(AutoModelForCausalLM, config, trust_remote_code=False)
    assert layout(build(cls, part, dtype, "grouped_mm")) == layout(expected)


MADE: dict[str, tuple[Callable[[], torch.Tensor], torch.dtype]] = {
    "empty": (lambda: torch.empty(2), torch.bfloat16),
    "no type said": (lambda: torch.zeros(2, dtype=None), torch.bfloat16),
    "a number": (lambda: torch.tensor(0.5), torch.bfloat16),
    "filled": (lambda: torch.full((2,), 0.5), torch.bfloat16),
    "integers divided": (lambda: torch.arange(4) / 4, torch.bfloat16),
    "integers": (lambda: torch.arange(4), torch.int64),
    "filled with integers": (lambda: torch.full((2,), 1), torch.int64),
    "a type said": (lambda: torch.empty(2, dtype=torch.float32), torch.float32),
    "made a float": (lambda: torch.arange(4).float(), torch.float32),
    "a type said by position": (lambda: torch.arange(4).to(torch.float32), torch.float32),
    "numpy's": (lambda: torch.tensor(np.ones(2, np.float32)), torch.float32),
    "of floats": (lambda: torch.ones(2, dtype=torch.float32) * 2, torch.float32),
}


@pytest.mark.parametrize("how", MADE)
def test_the_type_of_new_tensors_is_what_torchs_default_type_would_make_it(how: str) -> None:
    make, expected = MADE[how]
    with _InThisThread(torch.bfloat16):
        made = make()
    assert made.dtype == expected
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(made, make()) or how in ("empty", "a type said")
    finally:
        torch.set_default_dtype(torch.float32)
