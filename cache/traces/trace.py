"""Recorded routing: which experts every token of a workload went to, in one .safetensors file.

docs/traces.md describes the format, version 1. A trace is opened as a memory map: however long, it takes next to
no RAM.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache.errors import TraceError
from cache.traces.checks import check_contents, check_structure
from cache.traces.tensorfile import Column, read_tensors, row_blocks, write_tensors

FORMAT = "offload-trace"
VERSION = "1"

PREFILL, DECODE, PADDING = 0, 1, 2  # what `phase` says of a token

PER_TOKEN = ("experts", "weights", "step", "phase", "forward", "scores", "predicted", "ids", "embeddings")
"""The arrays with one row a token."""


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """A recorded routing trace: T tokens of S sequences, L MoE layers, the K experts of E that each token went to.

    The tokens of a sequence lie together, in order; those of a batch are told apart by `forward`. Making one checks
    dtypes, shapes and metadata and raises TraceError; `check` looks at every value.
    """

    experts: NDArray[np.unsignedinteger[Any]]
    """uint8 or uint16 [T, L, K]: ids in descending router weight."""
    weights: NDArray[np.floating[Any]]
    """float16 or float32 [T, L, K]: the router's weights for them."""
    sequence_offsets: NDArray[np.int64]
    """int64 [S + 1]: sequence s is the tokens from sequence_offsets[s] to sequence_offsets[s + 1]."""
    step: NDArray[np.int32]
    """int32 [T]: the forward pass within the sequence."""
    phase: NDArray[np.uint8]
    """uint8 [T]: PREFILL, DECODE or PADDING."""
    metadata: Mapping[str, str]
    """What the recorder knew, as text; `model`, `num_layers` and so on are read from it."""
    forward: NDArray[np.int64] | None = None
    """int64 [T]: the forward pass within the recording, shared by a batch; None: no pass had two sequences."""
    scores: NDArray[np.float16] | None = None
    """float16 [T, L, E]: the router's logits as selected on."""
    predicted: NDArray[np.unsignedinteger[Any]] | None = None
    """uint8 or uint16 [T, L, D, P]: what a predictor said 1 to D layers ahead."""
    ids: NDArray[np.int32] | None = None
    """int32 [T]: the tokens themselves."""
    embeddings: NDArray[np.float16] | None = None
    """float16 [T, D]: a sketch of each token's embedding."""
    name: str = field(default="trace", kw_only=True)
    """What reports and errors call it: the file's name, or what its maker said."""

    def __post_init__(self) -> None:
        check_structure(self.name, self._arrays(), self.metadata)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> Trace:
        """The trace in the file `path`, memory-mapped. The file must not change while the trace is in use.

        Raises TraceError, saying what and where, for a file that is no trace, cut short or damaged, and OSError for one
        that cannot be read. `check=False` looks at the header only: for files that were checked before.
        """
        arrays, metadata = read_tensors(path)
        missing = [name for name in ("experts", "weights", "sequence_offsets", "step", "phase") if name not in arrays]
        if metadata.get("format") != FORMAT:
            raise TraceError(f'{path} is not a routing trace: its metadata does not say "format": "{FORMAT}"')
        if metadata.get("version") != VERSION:
            said = metadata.get("version", "none")
            raise TraceError(f"{path} is a trace of version {said}, this program reads version {VERSION}: update it")
        if missing:
            raise TraceError(f"{path}: the trace has no {', '.join(missing)}")
        known = {name: arrays[name] for name in ("sequence_offsets", *PER_TOKEN) if name in arrays}
        trace = cls(**known, metadata=metadata, name=str(path))
        if check:
            trace.check()
        return trace

    @classmethod
    def from_arrays(
        cls,
        experts: ArrayLike,
        weights: ArrayLike,
        sequence_offsets: ArrayLike,
        *,
        num_experts: int,
        step: ArrayLike | None = None,
        phase: ArrayLike | None = None,
        name: str = "trace",
        metadata: Mapping[str, str] | None = None,
        **optional: NDArray[Any],
    ) -> Trace:
        """A trace in memory, of arrays as above and `metadata` beyond what they say themselves.

        By default every token is a decoding step of its own. Raises TraceError as `open` does.
        """
        experts = np.asarray(experts, expert_dtype(num_experts))
        if experts.ndim != 3:
            raise TraceError(f"{name}: experts have the shape {experts.shape}, not [tokens, layers, top_k]")
        offsets = np.asarray(sequence_offsets, np.int64)
        tokens, num_layers, top_k = experts.shape
        if step is None:
            lengths = np.diff(offsets)
            step = np.arange(lengths.sum()) - np.repeat(offsets[:-1], lengths)
        described = {
            **{"model": "unknown", "workload": "unknown", "source": "arrays"},
            **describe(num_layers, num_experts, top_k, range(num_layers)),
            **(metadata or {}),
        }
        trace = cls(
            experts,
            np.asarray(weights) if np.asarray(weights).dtype == np.float16 else np.asarray(weights, np.float32),
            offsets,
            np.asarray(step, np.int32),
            np.full(tokens, DECODE, np.uint8) if phase is None else np.asarray(phase, np.uint8),
            described,
            name=name,
            **optional,
        )
        trace.check()
        return trace

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        """L: MoE layers."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """K: experts a token goes to."""
        return int(self.experts.shape[2])

    @property
    def num_experts(self) -> int:
        """E: experts of a layer."""
        return int(self.metadata["num_experts"])

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.sequence_offsets) - 1

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layer index of each MoE layer."""
        return tuple(int(layer) for layer in self.metadata["layers"].split(","))

    @property
    def model(self) -> str:
        """Which model was recorded."""
        return self.metadata["model"]

    @property
    def workload(self) -> str:
        """What it was doing."""
        return self.metadata["workload"]

    @property
    def expert_bytes(self) -> int | None:
        """Bytes of one expert, where the recorder knew."""
        return int(self.metadata["expert_bytes"]) if "expert_bytes" in self.metadata else None

    @cached_property
    def fingerprint(self) -> str:
        """A digest of every array and the shape: equal for traces that replay alike. Reads the whole trace."""
        digest = hashlib.blake2b(digest_size=16)
        for name, array in self._arrays().items():
            digest.update(f"{name} {array.dtype.str} {array.shape} of {self.num_experts}".encode())
            for block in row_blocks(array):
                digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        shape = f"{self.num_tokens} tokens, {self.num_sequences} sequences, {self.num_layers} layers"
        return f"Trace({self.name}: {shape}, top-{self.top_k} of {self.num_experts} experts)"

    def check(self) -> None:
        """Look at every value, a block of tokens at a time. Raises TraceError for the first that cannot be."""
        check_contents(self.name, self._arrays(), self.num_experts)

    def check_model(self, num_layers: int, num_experts: int) -> None:
        """Raises TraceError if this is the profile of a model of another shape."""
        if (self.num_layers, self.num_experts) != (num_layers, num_experts):
            raise TraceError(
                f"{self.name} has {self.num_layers} layers of {self.num_experts} experts, not {num_layers} of "
                f"{num_experts}: name a profile of the same model"
            )

    def select(self, sequences: Sequence[int] | range) -> Trace:
        """The trace of some sequences, in the given order. Neighbours stay mapped; others are copied to memory.

        Raises TraceError as `existing` does.
        """
        chosen = self.existing(sequences)
        starts, ends = self.sequence_offsets[chosen], self.sequence_offsets[chosen + 1]
        offsets = np.concatenate(([0], np.cumsum(ends - starts)))
        rows: Any = slice(int(starts[0]), int(ends[-1]))
        if np.any(np.diff(chosen) != 1):
            rows = np.concatenate([np.arange(*span) for span in zip(starts, ends, strict=True)])
        return replace(
            self,
            sequence_offsets=offsets,
            **{name: array[rows] for name, array in self._arrays().items() if name in PER_TOKEN},
        )

    def existing(self, sequences: Iterable[int]) -> NDArray[np.int64]:
        """`sequences` as an array. Raises TraceError for one that the trace does not have, and for none at all."""
        chosen = np.fromiter(sequences, np.int64)
        outside = chosen[(chosen < 0) | (chosen >= self.num_sequences)]
        if outside.size:
            raise TraceError(f"{self.name} has the sequences 0 to {self.num_sequences - 1}, and no {outside[0]}")
        if not chosen.size:
            raise TraceError(f"{self.name}: no sequence was asked for: name at least one")
        return chosen

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to `path`, atomically; what is mapped is not read into memory at once.

        Raises OutputError and DiskSpaceError.
        """
        write_tensors(
            path,
            {name: Column(array.dtype, array.shape, row_blocks(array)) for name, array in self._arrays().items()},
            self.metadata,
        )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays = {name: getattr(self, name) for name in ("sequence_offsets", *PER_TOKEN)}
        return {name: array for name, array in arrays.items() if array is not None}


def expert_dtype(num_experts: int) -> np.dtype[Any]:
    """The narrowest dtype for the ids of that many experts."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def describe(num_layers: int, num_experts: int, top_k: int, layers: Sequence[int]) -> dict[str, str]:
    """The metadata that says what a trace is and how large."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_layers": str(num_layers),
        "num_experts": str(num_experts),
        "top_k": str(top_k),
        "layers": ",".join(map(str, layers)),
    }
