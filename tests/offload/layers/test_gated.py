"""Gates of experts, known by their code: they do what the model's own module does."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from known_gates import gated
from torch import nn

from offload.formats.gate import SILU
from offload.layers.gated import gate_of

CLASSES = {
    "gpt_oss": "GptOssExperts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
    "deepseek_v4": "DeepseekV4Experts",
    "hy_v4": "HYV4Experts",
    "glm5_next": "Glm5NextTextExperts",
}


def experts_of(family: str, name: str) -> Any:
    """A module of a family's class, with the numbers of its gate alone."""
    found: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls = getattr(found, name)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.has_gate, module.act_fn = True, nn.SiLU()
    module.limit = module.swiglu_limit = 1.5
    module.alpha = module.swiglu_alpha = 1.7
    return module


@pytest.mark.parametrize("family", CLASSES)
def test_a_known_gate_is_the_module_s_own(family: str) -> None:
    try:
        module = experts_of(family, CLASSES[family])
    except (ModuleNotFoundError, AttributeError):
        pytest.skip(f"this transformers has no {CLASSES[family]}")
    gate = gate_of(module)
    assert gate is not None and gate.limit == 1.5
    both = 2 * torch.randn(20, 64, dtype=torch.float64)
    torch.testing.assert_close(gated(both, gate), module._apply_gate(both))


def test_the_commonest_gate_and_what_is_no_gate_of_ours() -> None:
    module = experts_of("qwen3_moe", "Qwen3MoeExperts")
    assert gate_of(module) == SILU
    module.act_fn = nn.GELU()
    assert gate_of(module) is None
    module.has_gate = False
    assert gate_of(module) is None
    assert gate_of(experts_of("gpt_oss", "GptOssExperts")) != SILU
    assert gate_of(SimpleNamespace(has_gate=True, act_fn=nn.SiLU())) is None
