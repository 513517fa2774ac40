"""The tiny model of these tests, in a checkpoint and as transformers has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from offload.model import OffloadedModel

_quiet = pytest.fixture(autouse=True, scope="module")(tiny.one_thread)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture(scope="module")
def resident(checkpoint: Path) -> Any:
    return tiny.resident(checkpoint)


@pytest.fixture(params=["cpu", "emulated"])
def model(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[OffloadedModel]:
    """Five experts fit; 100 tokens of context, 64 a pass."""
    with tiny.open_model(checkpoint, expert_cache=tiny.FEW, context=100, device=request.param) as model:
        yield model
