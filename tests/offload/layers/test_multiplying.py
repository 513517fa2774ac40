"""Plain matrices that our kernel multiplies by: which they are, and that nothing but their rounding differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_levels import kernels_of
from tiny import ids, one_thread, open_model, resident, same_bits, save
from torch import nn

from cache.errors import FormatError
from offload.formats.cpu import native
from offload.layers.products import PlainLinear, PlainMatrix, Products, takes_our_products, use_products
from offload.layers.rows import RowLinear

_threads = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture
def below_bf16() -> Iterator[None]:
    """Our kernels are those of a processor without bfloat16 products."""
    with kernels_of(min(native.level(), native.AVX512) or native.AVX2):
        yield


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that keep matrices as [n, k] and as [k, n]."""
    return save(tmp_path_factory.mktemp("bf16"), request.param, torch.bfloat16)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(320, 96), nn.Linear(96, 64, bias=False), nn.Linear(64, 33)).bfloat16()


@torch.no_grad()
def test_linear_layers_take_our_products_unless_told_to_be_exact(below_bf16: None) -> None:
    x = torch.randn(2, 5, 320, dtype=torch.bfloat16)
    model, exact = layers(), layers()
    theirs = model(x)
    use_products(exact, exact=True)
    assert [type(layer) for layer in exact] == [nn.Linear, RowLinear, nn.Linear]
    assert same_bits(exact(x), theirs)
    use_products(model, exact=False)
    assert [type(layer) for layer in model] == 3 * [PlainLinear]
    torch.testing.assert_close(model(x), theirs, rtol=0.02, atol=0.02)
    alone = torch.stack([torch.cat([model(row[None]) for row in rows]) for rows in x])
    assert same_bits(model(x), alone)


@torch.no_grad()
def test_what_our_kernel_does_not_serve_stays_torchs(below_bf16: None) -> None:
    model = nn.Sequential(nn.Linear(40, 64).bfloat16(), nn.Linear(64, 64))
    use_products(model, exact=False)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    layer = nn.Sequential(nn.Linear(64, 32).bfloat16())
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        expected = layer(x)
        use_products(layer, exact=False)
        assert type(layer[0]) is PlainLinear
        assert same_bits(layer(x), expected)
    assert layer.to("meta")(x.to("meta")).shape == (3, 32)


def test_an_experts_matrices_are_ours_and_its_biases_stay(below_bf16: None) -> None:
    weights: Any = {
        "up": torch.zeros(8, 64).bfloat16(),
        "up_bias": torch.zeros(8).bfloat16(),
        "odd": torch.zeros(8, 40),
    }
    found = Products(exact=False).of_expert(weights, transposed=False)
    assert isinstance(found["up"], PlainMatrix)
    assert found["up"].weight is weights["up"]
    assert (found["up_bias"], found["odd"]) == (weights["up_bias"], weights["odd"])


def without_sinks(model: nn.Module) -> nn.Module:
    """Sinks of next to no weight: then a first token's attention is its value, whatever computes it."""
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.fill_(-1e4)
    return model


@torch.no_grad()
def test_bits_hang_on_no_budget(folder: Path, below_bf16: None) -> None:
    x = ids(1, 23)
    logits: list[torch.Tensor] = []
    cache = None
    for _ in range(3):
        with open_model(folder, exact=False, expert_cache=cache) as model:
            slot = model.plan.slot_bytes
            cache = 5 * slot if cache is None else 2 * slot
            without_sinks(model.module)
            whole = model(x).logits
            token = model(x[:, :1]).logits
            layer = model.parts.experts.layers[0]
            assert takes_our_products(layer, None)
        assert same_bits(token, whole[:, :1])
        logits.append(whole)
    assert all(same_bits(each, logits[0]) for each in logits)
    expected = without_sinks(resident(folder, torch.bfloat16))(x).logits
    near = ((logits[0] - expected).abs() < 0.2).all(-1)
    assert near.sum() >= 20  # of 23 tokens: rounding sends some to other experts
    with open_model(folder) as model:
        without_sinks(model.module)
        assert same_bits(model(x).logits, expected)


@torch.no_grad()
def test_inputs_are_rounded_where_it_is_asked_for(tmp_path: Path) -> None:
    if not native.level():
        pytest.skip("no kernel of ours runs on this CPU")
    save(tmp_path, "qwen3_moe", torch.bfloat16, hidden_size=256, moe_intermediate_size=128)
    x, found = ids(1, 9), {}
    for options in ({}, {"activations": "int8"}, {"dense": "nf4"}, {"dense": "nf4", "activations": "int8"}):
        with open_model(tmp_path, experts="nf4", **options) as model:
            found[tuple(options)] = model(x).logits
    for plain, rounded in (((), ("activations",)), (("dense",), ("dense", "activations"))):
        assert not same_bits(found[plain], found[rounded])
        difference = (found[plain] - found[rounded]).float().norm() / found[plain].float().norm()
        assert 0 < difference < 0.2


def test_rounding_that_is_unknown_or_without_effect_is_told(folder: Path) -> None:
    with pytest.raises(FormatError, match='--activations "int4": choose one of auto, int8'):
        open_model(folder, activations="int4")
    with (
        pytest.warns(UserWarning, match="--activations int8 has no effect: no matrix is NF4"),
        open_model(folder, activations="int8"),
    ):
        pass
