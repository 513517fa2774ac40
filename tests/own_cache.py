"""A cache folder of one's own, for as long as a fixture lives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was measured or stored elsewhere is no part of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLOAD_CACHE", str(tmp_path_factory.mktemp("offload-cache")))
        yield
