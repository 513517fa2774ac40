"""scripts/bench/cpu_kernels.py on a tiny expert."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scripts.bench import cpu_kernels


@pytest.fixture
def _unpinned() -> Iterator[None]:
    """The benchmark pins its process to one core."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to pin a process here")
@pytest.mark.usefixtures("_unpinned")
def test_it_compares_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "SHAPES", {"tiny": (128, 64)})
    out = tmp_path / "kernels.md"
    args = argparse.Namespace(shapes=["tiny"], repetitions=2, rotate_bytes=400_000, out=out)
    tiny = cpu_kernels.benchmark(args)["shapes"]["tiny"]
    levels = {"bf16", "int8", "nf4", "nf4, int8 inputs", "nested8", "nested4", "nested2"}
    for tokens in cpu_kernels.TOKENS:
        assert levels < tiny["ms"][tokens].keys()
        assert all(value > 0 for value in tiny["ms"][tokens].values())
        for label, ms in tiny["ms"][tokens].items():
            assert tiny["gflops"][tokens][label] == pytest.approx(tokens * 2 * 3 * 128 * 64 / ms / 1e6, abs=0.06)
    assert tiny["ratio"].keys() == {"bf16", "int8", "nf4", "nested4"}
    assert tiny["per_expert_ms"]["encode"].keys() == {"int8", "nf4", "nested"}
    assert all(ms > 0 for kind in tiny["per_expert_ms"].values() for ms in kind.values())
    assert "| nested2 |" in out.read_text(encoding="utf-8")
