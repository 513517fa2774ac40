"""What several tests of replays read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cache.machines import machine


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a machine was measured to do."""
    file = tmp_path_factory.mktemp("machine") / "profile.json"
    machine().write(file)
    return file
