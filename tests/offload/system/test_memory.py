"""What the process keeps of memory that was given back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# Blocks grow, as a prompt's activations do from chunk to chunk, and something small that stays lies behind them.
PROGRAM = """
import numpy as np
from offload.system import memory
if {ours}:
    memory.return_large_blocks()
largest = np.ones(30 * 2**17)
del largest
kept, before = [], memory.resident_bytes()
for mib in range(8, 24):
    blocks = [np.ones(mib * 2**17) for _ in range(2)]
    kept.append(np.ones(2**13))
    del blocks
print(memory.resident_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one than glibc")
def test_large_blocks_go_back_to_the_system() -> None:
    def left(ours: bool) -> int:
        program = PROGRAM.format(ours=ours)
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ, cwd=ROOT
        )
        return int(run.stdout)

    assert left(ours=True) < 8 * 2**20 < left(ours=False)
