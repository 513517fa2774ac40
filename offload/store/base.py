"""What the experts of a model are stored as: at which precisions, in which slices, and how a slice is read.

A **precision** is a form that an expert can be computed in, a **slice** a piece of it that is read, moved and cached by
itself. Mostly a precision is one slice. In a nested format a better precision is the slices of the lesser one and one
more, so that an upgrade moves only what is missing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cache.types import ExpertKey


class Matrix(Protocol):
    """A weight matrix [n, k] that is not a plain tensor."""

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [m, k] -> x @ W.T [m, n], in the dtype of x."""

    def linear_each(self, x: torch.Tensor, matrices: Sequence[Any]) -> torch.Tensor:
        """x [1, k] or [len(matrices), k] -> [len(matrices), n]: a row for each of `matrices`, all of this one's kind.

        The bits are those that `linear` gives for a row alone.
        """


Weights = Mapping[str, "torch.Tensor | Matrix"]


class SliceReader(ABC):
    """One thread's way from an expert's bytes on disk to a slot in host memory."""

    @abstractmethod
    def read(self, key: ExpertKey, slot: torch.Tensor, part: int = 0, parts: int = 1) -> int:
        """Fill `slot` (uint8 [slot_bytes], host memory) with the expert's slice; returns bytes read from disk.

        With `parts` (from `ExpertSlice.parts`), only this part of it. Raises TransferError when the disk does.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the files."""


class ExpertSlice(ABC):
    """One slice of every expert, as bytes on disk. Threads share it; each brings a reader of its own."""

    name: str

    @property
    @abstractmethod
    def slot_bytes(self) -> int:
        """Bytes of memory that any expert's slice fits in."""

    @property
    @abstractmethod
    def expert_bytes(self) -> int:
        """Bytes of all experts' slices on disk."""

    @property
    @abstractmethod
    def reader_bytes(self) -> int:
        """Host memory one reader takes at most, conversion temporaries included."""

    @property
    def copies_out(self) -> bool:
        """Whether what was read still has to be copied to its place: the disk should not wait for that."""
        return False

    @abstractmethod
    def open(self) -> SliceReader:
        """A reader for one thread."""

    @abstractmethod
    def record_bytes(self, key: ExpertKey) -> int:
        """What the expert's slice takes on disk."""

    @abstractmethod
    def parts(self, key: ExpertKey, readers: int) -> int:
        """In how many parts it may be read, by as many readers at once, so that it is there the sooner."""


@dataclass(frozen=True)
class Precision:
    """A form that experts can be computed in, and the slices (indices) that it takes."""

    name: str
    slices: tuple[int, ...]


class ExpertStore(ABC):
    """All experts of a model at one or several precisions, the best one first."""

    precisions: Sequence[Precision]
    slices: Sequence[ExpertSlice]

    @abstractmethod
    def layout(self, layer: int) -> Hashable:
        """What slots of this layer look like; layers with equal layouts can share views of a slot."""

    @abstractmethod
    def weights(self, layer: int, precision: int, slots: Sequence[torch.Tensor]) -> Weights:
        """The expert of `layer` whose slices lie in `slots` (uint8), as parameters at `precision`; no copy."""

    @property
    def slot_bytes(self) -> list[int]:
        """Of each slice."""
        return [each.slot_bytes for each in self.slices]

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts on disk, at all precisions."""
        return sum(each.expert_bytes for each in self.slices)

    @property
    def reader_bytes(self) -> int:
        """Host memory one reader takes at most to read any slice."""
        return sum(each.reader_bytes for each in self.slices)

    @property
    def readers_per_place(self) -> int:
        """Readers for each expert on its way: where one copies what it has read, another one reads meanwhile."""
        return 2 if all(each.copies_out for each in self.slices) else 1
