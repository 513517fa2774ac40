"""What the process keeps of memory that was given back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[3]

# Blocks grow, as a prompt's activations do from chunk to chunk, and something small that stays lies behind them.
PROGRAM = """
import numpy as np
from offload.system import memory
{first}
largest = np.ones(30 * 2**17)
del largest
kept, before = [], memory.resident_bytes()
for mib in range(8, 24):
    blocks = [np.ones(mib * 2**17) for _ in range(2)]
    kept.append(np.ones(2**13))
    del blocks
print(memory.resident_bytes() - before)
"""


LOADING = """
from offload.model import OffloadedModel
OffloadedModel.from_pretrained({folder!r}, cpu_mem="8G", device="cpu", context=256).close()
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one than glibc")
MOST = 8 * 2**20


def left(first: str) -> int:
    """What stays resident of such blocks, in a process that begins with `first`."""
    program = PROGRAM.format(first=first)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ, cwd=ROOT
    )
    return int(run.stdout)


def test_large_blocks_go_back_to_the_system() -> None:
    assert left("memory.return_large_blocks()") < MOST < left("")


def test_they_do_wherever_a_model_was_loaded(tmp_path: Path) -> None:
    """Loading says so for the whole process. The blocks grow from chunk to chunk as a long prompt's activations do."""
    assert left(LOADING.format(folder=str(tiny.save(tmp_path, "qwen3_moe")))) < MOST
