"""Our kernels held to a level, in a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from offload.formats.cpu import native
from offload.system import instructions

LEVELS = {"plain": native.NONE} | {name: i for i, name in enumerate(instructions.LEVELS) if 0 < i <= native.BF16}


@contextmanager
def kernels_of(level: int) -> Iterator[None]:
    """In here our kernels are those of `level`; skips the test where this CPU has it not, or OFFLOAD_CPU forbids it."""
    before, library = native.level(), native.library()
    if level > before or library is None:
        pytest.skip("not built, or not for this CPU")
    library.level_choose(level)
    try:
        yield
    finally:
        library.level_choose(before)
