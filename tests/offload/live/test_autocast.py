"""Inside `torch.autocast` the model says what the resident one says there: its experts' products are not cast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from offload.layers.autocast import cast

DTYPES = (torch.float32, torch.bfloat16)
CAST = (torch.bfloat16, torch.float16)


def under_autocast(model: Any, dtype: torch.dtype, tokens: int) -> torch.Tensor:
    """What it says of a prompt, in the dtype that autocast makes of it."""
    with torch.no_grad(), torch.autocast("cpu", dtype):
        logits: torch.Tensor = model(tiny.ids(1, tokens)).logits
    return logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen2_moe", {"hidden_size": 256, "moe_intermediate_size": 256}),  # wide enough for `mv` to be tried
        ("gpt_oss", {}),  # has biases, a gate of its own, and rows that are no whole vectors
    ],
)
def test_autocast_gives_the_resident_models_bits(
    tmp_path: Path, family: str, sizes: dict[str, int], dtype: torch.dtype
) -> None:
    tiny.save(tmp_path, family, dtype, **sizes)
    resident = tiny.resident(tmp_path, dtype)
    for device in ("cpu", "emulated"):
        with tiny.open_model(tmp_path, device=device) as model:
            before = [model(tiny.ids(1, tokens)).logits for tokens in (1, 11)]
            for to in CAST:
                for tokens in (1, 11):
                    expected = under_autocast(resident, to, tokens)
                    assert expected.dtype is to
                    assert tiny.same_bits(under_autocast(model, to, tokens), expected)
            after = [model(tiny.ids(1, tokens)).logits for tokens in (1, 11)]
        assert all(tiny.same_bits(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_what_goes_into_a_layer_of_ours_is_cast_as_torch_casts_it(dtype: torch.dtype) -> None:
    x, layer = torch.ones(2, 8, dtype=dtype), torch.nn.Linear(8, 8, dtype=dtype)
    for to in CAST:
        with torch.no_grad(), torch.autocast("cpu", to):
            assert cast(x).dtype == layer(x).dtype
    assert cast(x) is x


@pytest.mark.parametrize("experts", ["int8", "nf4", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_weights_go_with_autocast(tmp_path: Path, experts: str, dtype: torch.dtype) -> None:
    """No other model says what is right: it is near what it says without."""
    tiny.save(tmp_path / "model", "qwen2_moe", dtype)
    dense = "auto" if experts == "int4" else experts
    store = tmp_path / "store"
    with tiny.open_model(tmp_path / "model", experts=experts, dense=dense, expert_store=store) as model:
        for to in CAST:
            for tokens in (1, 11):
                plain = model(tiny.ids(1, tokens)).logits.float()
                difference = under_autocast(model, to, tokens).float() - plain
                assert difference.norm() < 0.1 * plain.norm()
