"""The kernels of all experts of a layer at once, in Triton's interpreter; and all kernels compiled: no GPU needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grouped_reference
import pytest
import torch
from expert_slots import CLAMPED, KINDS, SILU, Experts, routing

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_with(command: list[str], **environment: str) -> None:
    """In a process of its own: whether Triton interprets or compiles is chosen when it is imported."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, **environment}
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_triton
@pytest.mark.parametrize("marked", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_in_the_interpreter(marked: str) -> None:
    tests = str(HERE / "interpreted_grouped.py")
    run_with(["-m", "pytest", "-p", "no:xdist", "-m", marked, tests], TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes much that the compiler refuses."""
    switches = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    run_with([str(HERE / "compile_kernels.py")], **switches)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 7, 32])
def test_on_cuda_they_compute_what_the_reference_does(kind: str, tokens: int) -> None:
    """At shapes of many tiles; and neither slots nor other tokens change a bit."""
    triton = pytest.importorskip("offload.engine.fused.kernels")
    experts = Experts.random(kind, 512, 192, 16, torch.bfloat16, CLAMPED if tokens == 7 else SILU, bias=tokens == 7)
    x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen, weights = routing(tokens, 8, 16)

    def compute(kernels: Any, experts: Experts, rows: slice, device: str) -> torch.Tensor:
        slots, block, places = experts.of(chosen[rows]).to(device), experts.block.to(device), experts.places
        inner = torch.empty(slots.numel(), places.down.k, dtype=x.dtype, device=device)
        out = torch.empty_like(x[rows], device=device)
        kernels.gate_up(x[rows].to(device), slots, inner, block, places)
        nothing = torch.empty(1, device=device)
        kernels.down(inner, slots, weights[rows].to(device), nothing, out, block, places, complete=True)
        return out.cpu()

    everyone = slice(None)
    found = compute(triton, experts, everyone, "cuda")
    expected = compute(grouped_reference, experts, everyone, "cpu").float()
    assert (found.float() - expected).norm() <= 8e-3 * expected.norm()
    assert torch.equal(compute(triton, experts.moved(), everyone, "cuda"), found)
    assert torch.equal(compute(triton, experts, slice(0, 1), "cuda"), found[:1])
