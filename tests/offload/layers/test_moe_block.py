"""One token's router and experts without the modules between: the bits of the modules, whatever is resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_heads import SHAPE, answers
from test_sublayer import OPTIONS, check_that_a_hook_is_called, layers
from tiny import open_model, same_bits, save
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeMoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from offload.engine import token
from offload.formats.cpu import native
from offload.layers import moe_block
from offload.layers.moe_block import MoeBlock

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")

FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"]
SIZES = {**SHAPE, "intermediate_size": 64, "moe_intermediate_size": 64}


def by_modules(model: Any) -> list[torch.Tensor]:
    """The same answers, each module called."""
    for layer in layers(model):
        layer.moe_block = None
    return answers(model)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each block that a token went through so."""
    found: list[int] = []
    experts = MoeBlock.experts

    def counted(self: MoeBlock, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(1)
        return experts(self, *args, **kwargs)

    monkeypatch.setattr(MoeBlock, "experts", counted)
    return found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Where all experts of a token were resident, whether a kernel computed them at once."""
    found: list[bool] = []
    whole = token._whole

    def counted(module: Any, x: torch.Tensor, group: Any) -> Any:
        rows = whole(module, x, group)
        found.append(rows is not None)
        return rows

    monkeypatch.setattr(token, "_whole", counted)
    return found


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(same_bits(one, other) for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"experts": "nf4"}, {"experts": "nf4", "activations": "int8"}, {"dense": "auto"}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_those_of_the_modules(
    family: str, options: dict[str, Any], tmp_path: Path, calls: list[int], at_once: list[bool]
) -> None:
    save(tmp_path, family, **SIZES)
    with open_model(tmp_path, **OPTIONS | options) as model:
        found = answers(model)
        assert len(calls) == 5 * len(layers(model)) >= len(at_once) > 0
        # Transposed experts of 16 bits are computed one product after the other.
        assert set(at_once) == {family != "gpt_oss" or "experts" in options}
        calls.clear()
        assert same(found, by_modules(model)) and not calls


@pytest.mark.parametrize("experts", ["auto", "nf4", "int8", "int4"])
def test_experts_that_are_not_resident_come(experts: str, tmp_path: Path) -> None:
    """And those whose format has no kernel for whole experts."""
    save(tmp_path, "qwen3_moe", **SIZES)
    with open_model(tmp_path, **OPTIONS, experts=experts) as model:
        wanted = by_modules(model)
        nbytes = model.plan.slot_bytes
    with open_model(tmp_path, **OPTIONS, experts=experts, expert_cache=3 * nbytes) as model:
        assert same(answers(model), wanted)
        assert model.stats.as_dict()["misses"] > 0


@pytest.mark.parametrize("name", ["mlp", "mlp.gate", "mlp.experts"])
def test_modules_with_hooks_are_called(name: str, tmp_path: Path, calls: list[int]) -> None:
    save(tmp_path, "qwen3_moe", **SIZES)
    with open_model(tmp_path, **OPTIONS) as model:
        check_that_a_hook_is_called(model, name, calls)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("change", ["weight", "data", "top_k", "bias", "class"])
def test_what_is_changed_of_a_router_counts(family: str, change: str, tmp_path: Path) -> None:
    save(tmp_path, family, **SIZES)
    with open_model(tmp_path, **OPTIONS) as model:
        before = answers(model)
        for layer in layers(model):
            router = layer.mlp.gate if family == "qwen3_moe" else layer.mlp.router
            if change == "top_k":
                router.top_k -= 1
            elif change == "data":
                router.weight.data = -router.weight.data
            elif change == "class":
                router.weight.data = -router.weight.data.float()
            elif change == "weight" or family == "qwen3_moe":
                router.weight = torch.nn.Parameter(-router.weight.data, requires_grad=False)
            else:
                router.bias = torch.nn.Parameter(torch.arange(len(router.bias)).bfloat16(), requires_grad=False)
        if change == "class":
            with pytest.raises(RuntimeError, match="dtype"):
                answers(model)
            return
        found = answers(model)
        assert not same(found, before) and same(found, by_modules(model))


def test_an_observer_and_a_recorder_are_told(tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", **SIZES)
    told: list[list[tuple[Any, ...]]] = []
    with open_model(tmp_path, **OPTIONS) as model:
        runtime = model.parts.runtime
        for way in (answers, by_modules):
            told.append([])
            runtime.observer = lambda layer, expert, y, weights, rows: told[-1].append(
                (layer, expert, y.tolist(), weights.tolist(), rows.tolist())
            )
            way(model)
    assert told[0] == told[1] != []


def test_blocks_that_do_more_are_not_known() -> None:
    for cls in (GraniteMoeMoE, Qwen2MoeSparseMoeBlock):
        assert moe_block.forward_code(cls) not in moe_block._FORWARD
    assert MoeBlock.of(torch.nn.Linear(1, 1)) is None
