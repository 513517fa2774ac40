"""The kernels of all experts of a layer at once, in Triton's interpreter: no GPU needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter() -> None:
    """In a process of its own, as it is chosen when Triton is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    tests = HERE / "interpreted_grouped.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", str(tests)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[2], env=env, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
