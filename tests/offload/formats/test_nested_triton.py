"""The Triton kernel of the nested format, in Triton's interpreter: no GPU needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import torch
from offload.formats import FORMATS
from offload.formats.nested import BITS
from offload.formats.gpu.nested import linear

form = FORMATS["nested"]
for n, k in [(64, 64), (70, 33), (128, 192), (5, 200)]:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.02
    fields = form.encode(weight)
    for level, bits in BITS.items():
        stored = {field.name: fields[field.name] for field in form.stored(n, k, level)}
        decoded = form.decode(stored, n, k, level, torch.float32)
        for m in (1, 2, 17):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            torch.testing.assert_close(linear(x, stored, n, bits), x @ decoded.T, rtol=1e-4, atol=1e-5)
            half = x.bfloat16()
            y = linear(half, stored, n, bits)
            assert y.dtype == half.dtype
            torch.testing.assert_close(y.float(), half.float() @ decoded.T, rtol=1e-2, atol=1e-3)
print("done")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_it_multiplies_like_decoded_weights_at_every_level() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT, env=env, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("done\n")
