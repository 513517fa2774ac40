"""One token's way up to a layer's experts in one call: the bits of the calls that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_heads import KINDS, SHAPE, answers
from tiny import open_model, same_bits, save
from transformers import DynamicCache, StaticCache
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeDecoderLayer

from offload.formats.cpu import native
from offload.formats.cpu.token_sublayer import AttentionSublayer
from offload.layers import linear, sublayer
from offload.layers.sublayer import _DecoderLayer

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")

OPTIONS: dict[str, Any] = {"exact": False, "dense": "nf4", "dtype": "bf16"}


def layers(model: Any) -> list[Any]:
    return [each for each in model.module.modules() if isinstance(each, _DecoderLayer)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each call of the kernel."""
    found: list[int] = []
    compute = AttentionSublayer.compute

    def counted(self: AttentionSublayer, *args: Any) -> Any:
        found.append(1)
        return compute(self, *args)

    monkeypatch.setattr(AttentionSublayer, "compute", counted)
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss"])
def test_bits_are_those_of_the_calls_it_stands_for(
    family: str, kind: dict[str, Any], tmp_path: Path, calls: list[int]
) -> None:
    save(tmp_path, family, **SHAPE)
    with open_model(tmp_path, **(OPTIONS | kind)) as model:
        together = answers(model)
        assert len(calls) == 5 * len(layers(model)) > 0
        for layer in layers(model):
            layer.sublayer = None
        each = answers(model)
        assert len(calls) == 5 * len(layers(model))
    assert all(same_bits(a, b) for a, b in zip(together, each, strict=True))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_matrices_of_many_blocks(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, family, **SHAPE)
    monkeypatch.setattr(linear, "NUMBERS_AT_ONCE", 1)
    with open_model(tmp_path, **OPTIONS) as model:
        assert len(layers(model)[0].self_attn.o_proj.blocks) == SHAPE["hidden_size"] // 64
        together = answers(model)
        for layer in layers(model):
            layer.sublayer = None
            layer.self_attn.heads = None
        assert all(same_bits(a, b) for a, b in zip(together, answers(model), strict=True))


def check_that_a_hook_is_called(model: Any, name: str, calls: list[int]) -> None:
    """On a module of the first layer; `calls` grows with each token and layer that is computed without modules."""
    first, *others = layers(model)
    seen: list[Any] = []
    before = answers(model)
    hook = first.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    calls.clear()
    assert all(same_bits(a, b) for a, b in zip(answers(model), before, strict=True))
    assert (len(seen), len(calls)) == (6, 5 * len(others))
    hook.remove()
    calls.clear()
    answers(model)
    assert len(calls) == 5 * len([first, *others])


def test_modules_with_hooks_are_called(tmp_path: Path, calls: list[int]) -> None:
    save(tmp_path, "qwen3_moe", **SHAPE)
    with open_model(tmp_path, **OPTIONS) as model:
        check_that_a_hook_is_called(model, "self_attn.o_proj", calls)


@pytest.mark.parametrize("dense", ["nf4", "auto"])
def test_modules_that_are_replaced_are_used(dense: str, tmp_path: Path, calls: list[int]) -> None:
    save(tmp_path, "qwen3_moe", **SHAPE)
    with open_model(tmp_path, **OPTIONS | {"dense": dense}) as model:
        before = answers(model)
        calls.clear()
        for layer in layers(model):
            linear = layer.self_attn.q_proj
            other = torch.nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16)
            layer.self_attn.q_proj = other
        found = answers(model)
        assert not calls and not any(same_bits(a, b) for a, b in zip(found[1:], before[1:], strict=True))
        for layer in layers(model):
            layer.sublayer = layer.self_attn.heads = None
        assert all(same_bits(a, b) for a, b in zip(found, answers(model), strict=True))


@pytest.mark.parametrize("dense", ["nf4", "auto"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("way", ["parameter", "data"])
def test_parameters_that_are_replaced_are_used(
    family: str, way: str, dense: str, tmp_path: Path, calls: list[int]
) -> None:
    """Also where they no longer are what the kernel takes."""
    save(tmp_path, family, **SHAPE)
    with open_model(tmp_path, **OPTIONS | {"dense": dense}) as model:
        for layer in layers(model):
            modules = [layer.input_layernorm, getattr(layer.self_attn, "q_norm", None)]
            owners = [(each, "weight") for each in modules if each is not None]
            if hasattr(layer.self_attn, "sinks"):
                owners.append((layer.self_attn, "sinks"))
            if dense == "auto":
                owners.append((layer.self_attn.v_proj, "weight"))
            for module, name in owners:
                parameter = getattr(module, name)
                if way == "data":
                    parameter.data = parameter.data * 3
                else:
                    setattr(module, name, torch.nn.Parameter(parameter.data * 3, requires_grad=False))
        found = answers(model)
        assert not calls
        for layer in layers(model):
            layer.sublayer = layer.self_attn.heads = None
        assert all(same_bits(a, b) for a, b in zip(found, answers(model), strict=True))


def test_attentions_and_hidden_states_are_given(tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", **SHAPE)
    with open_model(tmp_path, **OPTIONS) as model, torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
        states = model(torch.tensor([[4]]), past_key_values=cache, output_hidden_states=True).hidden_states
        assert len(states) == model.config.num_hidden_layers + 1
        assert all(each.shape == (1, 1, SHAPE["hidden_size"]) for each in states)


@pytest.mark.parametrize("kind", ["rows", "static", "mask"])
def test_what_the_kernel_does_not_take_is_computed_as_before(kind: str, tmp_path: Path, calls: list[int]) -> None:
    save(tmp_path, "mixtral", **SHAPE)
    with open_model(tmp_path, **OPTIONS) as model, torch.no_grad():
        text = torch.tensor([[1, 2, 3, 4]] * (2 if kind == "rows" else 1))
        cache: Any = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=16)
        told: dict[str, Any] = {"past_key_values": cache}
        model(text, **told)
        if kind == "mask":
            told["attention_mask"] = torch.ones(1, 1, 1, 5, dtype=torch.bool)
            told["attention_mask"][..., 1] = False
        token = text[:, :1]
        found = model(token, **told).logits
        assert bool(calls) == (kind == "mask")
        for layer in layers(model):
            layer.sublayer = None
        cache = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else DynamicCache()
        told["past_key_values"] = cache
        mask = told.pop("attention_mask", None)
        model(text, **told)
        if mask is not None:
            told["attention_mask"] = mask
        assert same_bits(found, model(token, **told).logits)


@pytest.mark.parametrize("shape", [(1, 4, 1, 5), (1, 1, 1, 1)])
def test_masks_of_other_shapes_are_torch_s(shape: tuple[int, ...], tmp_path: Path, calls: list[int]) -> None:
    """One for each head, or one value for all keys: the kernel knows neither."""
    save(tmp_path, "mixtral", **SHAPE)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, :2, :, :1] = shape[-1] == 1
    found = []
    with open_model(tmp_path, **OPTIONS) as model, torch.no_grad():
        for _ in range(2):
            cache = DynamicCache(config=model.config)
            model(torch.tensor([[1, 2, 3, 4]]), past_key_values=cache)
            found.append(model(torch.tensor([[5]]), past_key_values=cache, attention_mask=mask).logits)
            for layer in layers(model):
                layer.sublayer = layer.self_attn.heads = None
    assert not calls and same_bits(*found)


@pytest.mark.parametrize("change", [{"exact": True}, {"dense": "int8"}, {"exact": True, "dense": "auto"}])
def test_other_models_compute_as_before(change: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", **SHAPE)
    with open_model(tmp_path, **OPTIONS | change) as model:
        assert not layers(model)


def test_a_layer_of_other_code_is_not_known() -> None:
    assert not sublayer._is_known(GraniteMoeDecoderLayer)
