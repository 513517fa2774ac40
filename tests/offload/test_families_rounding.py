"""Where products need not be exact, bits hang on nothing but the model: eight families, every cache, every level.

The middle level and NF4 are marked `full`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import families
from family_runs import CACHES, cache_bytes, one_core
from kernel_levels import LEVELS, kernels_of
from test_families import EVERY_FLAG
from tiny import ids, open_model, same_bits

from offload.formats.cpu import native

_one_core = pytest.fixture(scope="module", autouse=True)(one_core)

pytestmark = pytest.mark.skipif(not native.level(), reason="our kernels do not run here")

WIDE = {"hidden_size": 128, "intermediate_size": 64, "head_dim": 32}
SIZES = {"mixtral": WIDE, "gpt_oss": WIDE}
"""Whole blocks of NF4, and heads that kernels take."""

_, least, middle, best = LEVELS


def answers(model: Any) -> list[torch.Tensor]:
    """Logits of two prompts, and of four tokens that continue the second, one at a time."""
    with torch.no_grad():
        found = [model(ids(2, 7)).logits]
        output = model(ids(1, 20), use_cache=True)
        for token in ids(1, 4, seed=1).unbind(1):
            found.append(output.logits)
            output = model(token[:, None], past_key_values=output.past_key_values, use_cache=True)
    return [*found, output.logits]


@pytest.mark.parametrize("level", [least, pytest.param(middle, marks=pytest.mark.full), best])
@pytest.mark.parametrize(
    "formats",
    [pytest.param({}, id="bf16"), pytest.param({"experts": "nf4", "dense": "nf4"}, id="nf4", marks=pytest.mark.full)],
)
@pytest.mark.parametrize("name", EVERY_FLAG)
def test_every_cache_gives_the_bits_of_all_resident(
    name: str, formats: dict[str, str], level: str, tmp_path: Path
) -> None:
    family = families()[name]
    family.save(tmp_path / "model", torch.bfloat16, **SIZES.get(name, {}))
    resident = family.resident(tmp_path / "model", torch.bfloat16)
    options: dict[str, Any] = {"exact": False, "dtype": "bf16", **formats}
    if formats:
        options["expert_store"] = tmp_path / "store"
    found = {}
    with kernels_of(LEVELS[level]):
        for cache in reversed(CACHES):
            nbytes = cache_bytes(cache, resident)
            with open_model(tmp_path / "model", **options, expert_cache=nbytes) as model:
                found[cache] = answers(model)
    for cache, own in found.items():
        assert all(same_bits(a, b) for a, b in zip(own, found["all"], strict=True)), cache
