"""A token's router in one call: what the family's own code says, but for rounding and equal scores."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import ids, open_model, save
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from offload.formats.cpu import native
from offload.formats.cpu.routing import route
from offload.layers import routing
from offload.layers.instead import original, with_ours
from offload.layers.routing import kind_of

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")

ROUTERS = {
    "qwen3_moe": "Qwen3MoeTopKRouter",
    "qwen3_5_moe": "Qwen3_5MoeTopKRouter",
    "olmoe": "OlmoeTopKRouter",
    "mixtral": "MixtralTopKRouter",
    "granitemoe": "GraniteMoeTopKRouter",
    "gpt_oss": "GptOssTopKRouter",
}


def router(family: str, experts: int, top_k: int, *, scaled: bool) -> Any:
    """One of the family's own class, whose scores are all different."""
    cls = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), ROUTERS[family])
    names = "num_experts_per_tok", "num_experts", "num_local_experts", "hidden_size", "norm_topk_prob"
    config = SimpleNamespace(**dict(zip(names, (top_k, experts, experts, 64, scaled), strict=True)))
    made = cls(config).bfloat16()
    torch.manual_seed(0)
    made.weight.data = torch.zeros(experts, 64, dtype=torch.bfloat16)
    made.weight.data[:, 0] = (torch.randperm(experts) - experts // 2) / 8
    if hasattr(made, "bias"):
        made.bias.data = (torch.randperm(experts) - experts // 2).bfloat16() / 8 - made.weight.data[:, 0]
    return made


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 4), (128, 8), (9, 9)])
@pytest.mark.parametrize("family", ROUTERS)
def test_the_family_s_own_code_says_so(family: str, experts: int, top_k: int, scaled: bool) -> None:
    own = router(family, experts, top_k, scaled=scaled)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    expected = own(x)
    own.kind = kind_of(type(own))
    own.__class__ = with_ours(routing._Router, type(own))
    found = own(x)
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert [each.shape for each in found] == [each.shape for each in expected]
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[1], expected[1], rtol=2**-7, atol=0)
    rows = x.repeat(3, 1)
    assert all(torch.equal(each[2:], one) for each, one in zip(own(rows), expected, strict=True))


def test_of_equal_scores_the_first_is_chosen_and_none_twice() -> None:
    x, weight = torch.ones(1, 32).bfloat16(), torch.zeros(7, 32).bfloat16()
    weight[3] = 1
    told: dict[str, Any] = {"of_chosen": False, "scaled": True, "dtype": torch.float32}
    scores, weights, chosen = route(x, weight, 4, **told)
    assert chosen.tolist() == [[3, 0, 1, 2]] and scores.tolist() == [[0, 0, 0, 32, 0, 0, 0]]
    assert weights.sum().item() == pytest.approx(1)
    weight[5] = float("nan")
    assert route(x, weight, 4, **told)[2].tolist() == [[5, 3, 0, 1]]
    weight[:] = float("nan")
    assert route(x, weight, 7, **told)[2].tolist() == [list(range(7))]
    weight[:] = float("-inf")
    assert route(x, weight, 7, **told)[2].tolist() == [list(range(7))]


def test_another_weight_is_seen_however_it_is_given() -> None:
    own = router("gpt_oss", 8, 2, scaled=True)
    own.kind = kind_of(type(own))
    own.__class__ = with_ours(routing._Router, type(own))
    x, other = torch.ones(1, 64, dtype=torch.bfloat16), own.weight.data.flip(0).clone()
    first = own(x)[0]
    own.weight.data = other
    second = own(x)[0]
    assert torch.equal(second - own.bias, (first - own.bias).flip(1))
    own.weight = nn.Parameter(other.flip(0).clone())
    assert torch.equal(own(x)[0], first)


def test_what_is_no_number_stays_none() -> None:
    x, weight = torch.ones(1, 32).bfloat16(), torch.zeros(9, 32).bfloat16()
    weight[4] = float("nan")
    for of_chosen in (True, False):
        assert route(x, weight, 2, of_chosen=of_chosen, scaled=True, dtype=torch.float32)[1].isnan().all()


def test_routers_of_other_code_are_not_known() -> None:
    assert kind_of(DeepseekV3TopkRouter) is None


@pytest.mark.parametrize("exact", [True, False])
def test_models_that_need_not_be_exact_take_it(exact: bool, tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe")
    with open_model(tmp_path, exact=exact, dtype="bf16") as model:
        gate = model.module.model.layers[0].mlp.gate
        assert isinstance(gate, routing._Router) != exact
        assert type(gate).__name__ == "Qwen3MoeTopKRouter" == original(type(gate)).__name__
        assert model.generate(ids(1, 5), max_new_tokens=3, do_sample=False).shape == (1, 8)
        if not exact:  # its scores can be recorded, which needs its code
            with model.record_trace(tmp_path / "trace.safetensors", scores=True):
                model.generate(ids(1, 5), max_new_tokens=3, do_sample=False)
