"""How many layers ahead is what was asked for, as far as there are layers."""

from __future__ import annotations

import pytest

from offload.decide.rules import DEPTH, Rules


@pytest.mark.parametrize(("asked", "layers", "depth"), [(None, 8, DEPTH), (1, 8, 1), (3, 8, 3), (8, 8, 8), (9, 8, 8)])
def test_it_looks_as_far_as_it_is_told(asked: int | None, layers: int, depth: int) -> None:
    prefetcher = Rules(predictor="frequency", prefetch_depth=asked).make_prefetcher(layers, 4)
    assert prefetcher is not None and prefetcher.depth == depth
