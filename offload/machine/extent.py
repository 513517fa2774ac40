"""What of a machine is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offload.machine import compute, disk, overhead


@dataclass(frozen=True)
class Extent:
    """The defaults are what `offload profile` measures, as far as its time goes."""

    file_bytes: int = disk.FILE_BYTES
    record_bytes: Sequence[int] = disk.RECORD_BYTES
    disk_blocks: Sequence[int] = disk.BLOCK_BYTES
    formats: Sequence[str] = compute.FORMATS
    dense_formats: Sequence[str] = compute.DENSE_FORMATS
    experts: Mapping[tuple[int, int], Sequence[int]] = field(default_factory=lambda: compute.EXPERTS)
    dense_shape: tuple[int, int] = compute.DENSE_SHAPE
    dense_tokens: Sequence[int] = compute.DENSE_TOKENS
    overhead_tokens: Sequence[int] = overhead.TOKENS
    overhead_rounds: int = 3
    block_bytes: int | None = None
    copy_bytes: Sequence[int] = (2**18, 2**21, 2**23, 2**25)

    @property
    def usual_shape(self) -> tuple[int, int]:
        """The expert that is computed while something else is measured: the one with most counts of tokens."""
        return max(self.experts, key=lambda shape: len(self.experts[shape]))
