"""The kernels in C at each level that this CPU has, and what serves without them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_levels import LEVELS, kernels_of

from offload.formats.cpu import native


@pytest.fixture(params=[name for name in LEVELS if LEVELS[name] < native.BF16])
def nested_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way that this CPU has."""
    with kernels_of(LEVELS[request.param]):
        yield request.param


@pytest.fixture(params=[name for name in LEVELS if name != "plain"])
def kernel_level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each level of our kernels that this CPU has."""
    with kernels_of(LEVELS[request.param]):
        yield LEVELS[request.param]
