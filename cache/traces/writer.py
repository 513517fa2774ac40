"""A trace while it grows: tokens are appended to files beside the target, and become the trace when all is done.

A recording sees one token of every sequence of a batch after the other; a trace has sequence after sequence. So rows
are appended in the order of their making to plain files in the folder `NAME.partial`, and `journal.jsonl` there notes
how many of them belong to finished sequences: what a killed recording leaves behind, `recover` turns into a trace.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import OffloadError, TraceError
from cache.outputs import check_output, target, writing
from cache.traces.tensorfile import BLOCK_BYTES, Column, write_tensors
from cache.traces.trace import expert_dtype

_JOURNAL = "journal.jsonl"
_ROW = np.dtype([("sequence", "<i8"), ("forward", "<i8"), ("step", "<i4"), ("phase", "u1")])


@dataclass(frozen=True)
class Rows:
    """N tokens of one forward pass, sequence after sequence; arrays as in `Trace`, `sequence` int64 [N]."""

    sequence: NDArray[np.int64]
    forward: int
    step: int
    phase: NDArray[np.uint8]
    experts: NDArray[np.unsignedinteger[Any]]
    weights: NDArray[np.float32]
    scores: NDArray[np.float16] | None
    predicted: NDArray[np.unsignedinteger[Any]] | None = None
    ids: NDArray[np.int32] | None = None
    embeddings: NDArray[np.float16] | None = None


class TraceWriter:
    """Writes the trace `path`, pass by pass.

    `metadata` is the trace's and has num_layers, num_experts and top_k; `predicted` is (D, P), what was predicted of
    every token and layer, if anything was; `embeddings` is how long their sketches are, where ids and embeddings are
    recorded, else 0. Side effects: creates `path`.partial, which `finish` and `discard` remove.
    Raises TraceError if that is there already. Whatever writes raises OutputError and DiskSpaceError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str],
        *,
        scores: bool,
        predicted: tuple[int, int] | None = None,
        embeddings: int = 0,
    ) -> None:
        self.path = Path(path)
        self.folder = partial_folder(path)
        self.metadata = dict(metadata)
        self._columns = _columns(self.metadata, scores, predicted, embeddings)
        self._rows = self._kept_rows = self._sequences = self._kept_sequences = 0
        self._open_files = ExitStack()
        with writing(path):
            try:
                self.folder.mkdir()
            except FileExistsError:
                raise _in_the_way(path) from None
            self._journal = self._open_files.enter_context((self.folder / _JOURNAL).open("w", encoding="utf-8"))
            self._files: dict[str, IO[bytes]] = {
                name: self._open_files.enter_context((self.folder / name).open("wb")) for name in self._columns
            }
            said = {"scores": scores, "predicted": predicted, "embeddings": embeddings}
            self._note({**said, "metadata": self.metadata})

    @property
    def kept_sequences(self) -> int:
        """Sequences that will be in the trace, come what may."""
        return self._kept_sequences

    def append(self, rows: Rows) -> None:
        """Add one pass of the sequences under way."""
        described = np.empty(len(rows.sequence), _ROW)
        described["sequence"], described["forward"] = rows.sequence, rows.forward
        described["step"], described["phase"] = rows.step, rows.phase
        arrays = {**vars(rows), "rows": described}
        for name, (dtype, shape) in self._columns.items():
            data = np.ascontiguousarray(arrays[name], dtype)
            if data.shape[1:] != shape:
                raise ValueError(f"{name} of shape {data.shape}, not [N, {shape}]")
            with writing(self.path):
                self._files[name].write(data.data)
        self._rows += len(described)
        self._sequences = max(self._sequences, int(rows.sequence.max()) + 1)

    def keep(self) -> None:
        """The sequences under way are finished: from now on nothing but `discard` can lose them."""
        if self._rows == self._kept_rows:
            return
        with writing(self.path):
            for file in self._files.values():
                file.flush()
            self._note({"rows": self._rows, "sequences": self._sequences})
        self._kept_rows, self._kept_sequences = self._rows, self._sequences

    def drop(self) -> None:
        """Forget the sequences under way."""
        with writing(self.path):
            for name, (dtype, shape) in self._columns.items():
                file = self._files[name]
                file.seek(self._kept_rows * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
                file.truncate()
        self._rows, self._sequences = self._kept_rows, self._kept_sequences

    def finish(self) -> None:
        """Write the finished sequences to the target, atomically, and remove what is beside it.

        Without a single one nothing is written. After an error `recover` can still be used, if there is one.
        """
        try:
            with writing(self.path), self._open_files:
                self.drop()
            if self._kept_rows:
                _assemble(self.path, self.folder, self._columns, self._kept_rows, self.metadata)
        except OffloadError as error:
            if not self._kept_rows:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
            raise type(error)(f"{error}; `offload trace recover {self.path}` then saves what was finished") from error
        shutil.rmtree(self.folder)

    def discard(self) -> None:
        """Forget everything."""
        self._open_files.close()
        shutil.rmtree(self.folder)

    def _note(self, entry: Mapping[str, object]) -> None:
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()


def partial_folder(path: str | os.PathLike[str]) -> Path:
    """Where a recording of the trace `path` keeps what it has so far."""
    path = target(path)
    return path.with_name(path.name + ".partial")


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raises OutputError where no trace can be written, and TraceError if there is a file, or an interrupted recording,
    which would be lost; not if they are to be overwritten."""
    if not overwrite and Path(path).is_file():
        raise TraceError(f"{path} exists: choose another name, remove it, or pass --force")
    check_output(path)
    folder = partial_folder(path)
    if os.path.lexists(folder) and not (overwrite and _is_recording(folder)):
        raise _in_the_way(path)


def remove_partial(path: str | os.PathLike[str]) -> None:
    """Remove what an interrupted recording of the trace `path` left beside it, if there is such a thing."""
    if _is_recording(folder := partial_folder(path)):
        shutil.rmtree(folder, ignore_errors=True)


def _is_recording(folder: Path) -> bool:
    """Whether a recording made that folder, and not someone else."""
    return folder.is_dir() and ((folder / _JOURNAL).is_file() or not any(folder.iterdir()))


def _in_the_way(path: str | os.PathLike[str]) -> TraceError:
    folder = partial_folder(path)
    if not _is_recording(folder):
        return TraceError(f"{folder} is in the way, where a recording keeps what it has: remove it, or rename it")
    return TraceError(
        f"{folder} holds an interrupted recording: make a trace of it with "
        f"`offload trace recover {path}`, or pass --force to replace it"
    )


def recover(path: str | os.PathLike[str]) -> int:
    """Make the trace `path` of what a killed recording left beside it; gives the number of its sequences.

    For recordings that no longer run. Replaces what is at `path`, removes the folder beside it. Raises TraceError when
    there is no such folder or no finished sequence in it (the folder then stays), OutputError and DiskSpaceError.
    """
    folder = partial_folder(path)
    try:
        lines = (folder / _JOURNAL).read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        raise TraceError(f"no recording of {path} was interrupted: there is no {folder}") from None
    try:
        first, *others = [json.loads(line) for line in lines[:-1]]  # a line without its end was cut short
        columns = _columns(first["metadata"], first["scores"], first.get("predicted"), first.get("embeddings", 0))
        rows, sequences = (others[-1]["rows"], others[-1]["sequences"]) if others else (0, 0)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise TraceError(f"{folder / _JOURNAL} is damaged: nothing can be recovered; remove {folder}") from error
    if not rows:
        raise TraceError(f"{folder} holds no finished sequence: there is nothing to recover; remove it")
    _assemble(Path(path), folder, columns, rows, first["metadata"])
    shutil.rmtree(folder)
    return int(sequences)


def _columns(
    metadata: Mapping[str, str], scores: bool, predicted: Sequence[int] | None, embeddings: int
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """dtype and shape of one row of every file."""
    layers, experts, top_k = (int(metadata[key]) for key in ("num_layers", "num_experts", "top_k"))
    columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "rows": (_ROW, ()),
        "experts": (expert_dtype(experts), (layers, top_k)),
        "weights": (np.dtype("<f4"), (layers, top_k)),
    }
    if scores:
        columns["scores"] = (np.dtype("<f2"), (layers, experts))
    if predicted is not None:
        columns["predicted"] = (expert_dtype(experts), (layers, *predicted))
    if embeddings:
        columns["ids"] = (np.dtype("<i4"), ())
        columns["embeddings"] = (np.dtype("<f2"), (embeddings,))
    return columns


def _assemble(
    path: Path,
    folder: Path,
    columns: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    num_rows: int,
    metadata: Mapping[str, str],
) -> None:
    """The trace of the first `num_rows` rows in `folder`."""
    mapped = {}
    for name, (dtype, shape) in columns.items():
        nbytes = num_rows * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size < nbytes:
            raise TraceError(f"{folder / name} has {size} bytes, {nbytes} were written: nothing can be recovered")
        mapped[name] = np.asarray(np.memmap(folder / name, dtype, "r", shape=(num_rows, *shape)))
    rows = mapped.pop("rows")
    order = np.argsort(rows["sequence"], kind="stable")
    sequence, forward = rows["sequence"][order], rows["forward"][order]
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    tokens = {"step": rows["step"][order], "phase": rows["phase"][order]}
    first = forward[starts]
    if len(np.unique(first)) < len(first):  # some sequences began together
        tokens["forward"] = forward
    offsets = np.append(starts, num_rows).astype(np.int64)
    write_tensors(
        path,
        {
            "sequence_offsets": Column(np.dtype("<i8"), offsets.shape, [offsets]),
            **{name: Column(array.dtype, array.shape, [array]) for name, array in tokens.items()},
            **{name: Column(array.dtype, array.shape, _gathered(array, order)) for name, array in mapped.items()},
        },
        metadata,
    )


def _gathered(array: NDArray[Any], order: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    rows = max(1, BLOCK_BYTES * len(array) // max(array.nbytes, 1))
    return (array[order[start : start + rows]] for start in range(0, len(order), rows))
