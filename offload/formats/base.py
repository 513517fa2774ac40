"""What a storage format of an expert's matrices is: its fields, how they are made, and how to compute with them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from offload.formats.cpu.routing import TokenRouter
from offload.formats.gate import Gate


@dataclass(frozen=True)
class Field:
    """One tensor of a stored matrix."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return math.prod(self.shape) * self.dtype.itemsize


Fields = Mapping[str, torch.Tensor]


class GatedRows(Protocol):
    """Rows x [T, H] that go to experts, for a kernel that computes these whole: two products and a gate between."""

    most_rows: int
    """Of an expert: with more, plain products are faster."""

    def compute(
        self,
        places: Sequence[tuple[int, ...]],
        order: torch.Tensor,
        spans: Sequence[tuple[int, int]],
        y: torch.Tensor,
    ) -> None:
        """Write what each of several experts gives for its span of `order` (int64) to those rows of y [T * K, H].

        Row t * K + k of y is for row t of x. An expert is known by the addresses of its two biases, 0 for none, and by
        what `Format.gated_place` says.
        """

    def token(self, places: Sequence[bytes], inner: int, router: TokenRouter, before: torch.Tensor) -> torch.Tensor:
        """Of one token, x [1, H]: `before` [..., H], bfloat16, and what its experts give, weighted as `router` says.

        The places are those of the router's experts, in its order: as above, but as 64-bit numbers one after the other,
        without the last, which is `inner`. The sum is there after `begun.wait()`. Until then nobody may read it but
        kernels that wait by themselves, and what the addresses point to must stay.
        """


class Format(ABC):
    """A way to store a matrix [n, k] (n outputs, k inputs) in fewer bits, and to multiply by it.

    A format has one level or several. The form of a level is a prefix of the form of the next better one, so that a
    matrix can be upgraded by adding fields. Nothing of a format changes: one object serves all matrices and
    threads.
    """

    name: ClassVar[str]
    """What the code and files call it."""

    title: ClassVar[str]
    """What users type."""

    levels: ClassVar[tuple[str, ...]]
    """Its precisions, best first."""

    @abstractmethod
    def fields(self, n: int, k: int) -> list[tuple[Field, ...]]:
        """What a matrix [n, k] is stored as: one tuple per level, lowest first; a level is all tuples up to its own."""

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """weight [n, k], float32, bfloat16 or float16 -> every field. The same bits every time."""

    @abstractmethod
    def decode(self, fields: Fields, n: int, k: int, level: str, dtype: torch.dtype) -> torch.Tensor:
        """The stored fields of `level` as a matrix [n, k] of `dtype`: what the stored form means, on any device."""

    @property
    def packing(self) -> str:
        """The order that `packed` describes on this CPU: records in another one have another name."""
        return "cpu"

    def packed(self, n: int, k: int, level: str, device_type: str) -> tuple[Field, ...] | None:
        """How the matrix lies in memory on a device where it is computed; None: as stored.

        Never more bytes than the stored form.
        """
        return None

    def pack(self, fields: Fields, n: int, k: int, level: str, out: Fields) -> None:
        """Write the stored `fields` into the tensors `out`, as `packed` describes them.

        Raises ValueError where nothing is packed.
        """
        raise ValueError(f"{level} is computed as it is stored")

    @abstractmethod
    def linear(self, x: torch.Tensor, fields: Fields, n: int, k: int, level: str) -> torch.Tensor:
        """x [m, k] -> x @ W.T [m, n] in x's dtype. `fields` are the packed ones, or as stored: that makes no difference
        to the result where a format has several levels, whose fields may lie apart.

        Which kernel runs depends on the format, the shape, the device type, x's dtype and m, so that equal inputs give
        equal bits, wherever they lie (aligned to 64 bytes).
        """

    def linear_into(self, x: torch.Tensor, fields: Fields, n: int, k: int, level: str, out: torch.Tensor) -> None:
        """The same, written to `out` [m, n], whose rows may lie apart."""
        out.copy_(self.linear(x, fields, n, k, level))

    def linear_each(self, x: torch.Tensor, matrices: Sequence[Fields], n: int, k: int, level: str) -> torch.Tensor:
        """A row for each of `matrices`, in a batch: the same bits as `linear` gives for a row alone.

        x is [1, k], for all of them, or [len(matrices), k]; returns [len(matrices), n].
        """
        rows = x.split(1) if len(x) > 1 else [x] * len(matrices)
        return torch.cat([self.linear(row, fields, n, k, level) for row, fields in zip(rows, matrices, strict=True)])

    def place(self, fields: Fields) -> tuple[int, ...] | None:
        """Where the kernels that take several steps at once find a packed matrix; None where there are none."""
        return None

    def gated_place(self, up: Fields, down: Fields) -> tuple[int, ...] | None:
        """Where the kernel that computes whole experts finds one; None where there is no such kernel.

        `up` is the gate's matrix and that of up in one.
        """
        return None

    def gated_rows(self, x: torch.Tensor, gate: Gate) -> GatedRows | None:
        """x [T, H] for experts that have a place, and `gate`; None for a dtype that their kernel does not take."""
        return None

    def own_rows(self, n: int, k: int, level: str, device_type: str) -> int:
        """Products of a matrix [n, k] with up to so many rows run on the threads of our own kernels, not on torch's."""
        return 0

    def with_int8_inputs(self) -> Format:
        """The same format, whose products on a CPU round x to 8 bits; itself, where it has no kernels for that."""
        return self

    def stored(self, n: int, k: int, level: str) -> tuple[Field, ...]:
        """All fields that the stored form of `level` consists of. Raises ValueError for a level of another format."""
        return tuple(f for part in self.fields(n, k)[: self.levels[::-1].index(level) + 1] for f in part)
