"""The tiny model that most live tests open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

one_thread = pytest.fixture(scope="module", autouse=True)(tiny.one_thread)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of eight experts."""
    return tiny.save(tmp_path_factory.mktemp("live") / "model", "mixtral", num_hidden_layers=3, num_local_experts=8)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    """The same model, whole in memory: what every reply is compared with."""
    return tiny.resident(folder)
