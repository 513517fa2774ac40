"""scripts/bench/fused.py, as far as it goes without a GPU."""

from __future__ import annotations

import argparse

import grouped_reference
import pytest
import torch

from offload.engine.fused.layer import FusedLayer
from scripts.bench import fused
from scripts.bench.common import BenchmarkError


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(BenchmarkError, match="this machine has no CUDA GPU"):
        fused.benchmark(argparse.Namespace())


@pytest.mark.parametrize("as_gpt_oss", [False, True])
@pytest.mark.parametrize("form", fused.FORMATS)
def test_both_ways_compute_the_same(form: str, as_gpt_oss: bool) -> None:
    layer = fused.make_layer(128, 64, 6, as_gpt_oss, form, "cpu")
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen, weights = torch.tensor([[0, 2], [2, 5], [1, 0]]), torch.rand(3, 2)
    together = FusedLayer(grouped_reference, layer.places, x, weights).all(chosen.int(), layer.slots.view(-1))
    expected = layer.one_by_one(x, fused.groups_of(chosen), weights).float()
    assert (together.float() - expected).norm() <= 0.02 * expected.norm()


def test_the_table_has_a_row_for_each_format() -> None:
    ways = {"two launches": 0.02, "one by one": 0.2, "limit": 0.01}
    rows = [{"shape": "OLMoE", "format": f, "tokens": t, **ways} for f in ("bf16", "nf4") for t in fused.TOKENS]
    lines = fused.table(rows).splitlines()
    assert lines[2].startswith("| OLMoE, bf16 | 20 / 20 / 20 / 20 / 20 / 20 | 200 / ")
    assert len(lines) == 4
