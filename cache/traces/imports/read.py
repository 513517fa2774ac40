"""Which format a log has, and the trace of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType

from cache.errors import TraceError
from cache.traces.imports import orders_in_chaos, transformers_logits, vllm_ids
from cache.traces.imports.arrays import read_npz
from cache.traces.imports.logged import ImportOptions, Logged, write_logged
from cache.traces.writer import check_free

FORMATS: dict[str, ModuleType] = {module.NAME: module for module in (transformers_logits, vllm_ids, orders_in_chaos)}
AUTO = "auto"

_KNOWN = tuple(dict.fromkeys(suffix for module in FORMATS.values() for suffix in module.SUFFIXES))


class Log:
    """The files of a log, in order of their names, and their format.

    `source` is a file, or a folder that is searched with all its folders. Raises TraceError where there is none that
    the format can have, and where AUTO cannot tell which it is; OSError.
    """

    def __init__(self, source: str | os.PathLike[str], format: str = AUTO) -> None:
        if format not in (AUTO, *FORMATS):
            raise TraceError(f'--format "{format}": choose one of {", ".join((AUTO, *FORMATS))}')
        self.source = Path(source)
        wanted = _KNOWN if format == AUTO else FORMATS[format].SUFFIXES
        self.files = _files(self.source, wanted)
        self.format = _format_of(self.files) if format == AUTO else format

    @property
    def total(self) -> int:
        """About how many sequences there are: one a file, or one a line."""
        return sum(_lines(path) if path.suffix == ".jsonl" else 1 for path in self.files)

    def sequences(self, options: ImportOptions) -> Iterator[Logged]:
        """All of them, at most `options.limit`. Raises TraceError and OSError."""
        found: Iterator[Logged] = FORMATS[self.format].sequences(self.files, options)
        return islice(found, options.limit)

    def write(
        self,
        path: str | os.PathLike[str],
        options: ImportOptions,
        *,
        model: str = "unknown",
        workload: str | None = None,
        overwrite: bool = False,
        on_sequence: Callable[[], object] = lambda: None,
    ) -> int:
        """Write the trace `path` of the log, as `write_logged` does, and give the number of its sequences.

        Raises TraceError for what is no such log, saying what and where, and for a trace that is there already if it is
        not to be overwritten; OutputError and DiskSpaceError.
        """
        check_free(path, overwrite=overwrite)
        metadata = {
            "model": model,
            "workload": self.source.name if workload is None else workload,
            "source": f"offload trace import, {self.format}",
            **FORMATS[self.format].METADATA,
        }
        found = self.sequences(options)
        return write_logged(found, path, metadata, on_sequence=on_sequence, overwrite=overwrite)


def _files(source: Path, suffixes: Sequence[str]) -> list[Path]:
    if source.is_dir():
        inside = (path for path in source.rglob("*") if path.suffix in suffixes and not path.name.startswith("."))
        found = sorted(path for path in inside if path.is_file())
        if not found:
            raise TraceError(f"{source} has no file that ends in {', '.join(suffixes)}")
        return found
    source.open("rb").close()  # what cannot be opened is told as of every other file
    if source.suffix not in suffixes:
        raise TraceError(
            f"{source} ends in none of {', '.join(suffixes)}: docs/traces.md says how to save a log; pickles "
            "(.pt, .bin, .pkl) are not read, since they can run any program"
        )
    return [source]


def _format_of(files: Sequence[Path]) -> str:
    found = {_kind(path) for path in {path.suffix: path for path in files}.values()}
    if len(found) > 1:
        raise TraceError(f"{files[0].parent} may hold logs of {' and '.join(sorted(found))}: say which with --format")
    return found.pop()


def _kind(path: Path) -> str:
    """The format that a file of this name, or an .npz of this content, has."""
    if path.suffix == ".npz":
        logits = any(name.startswith("layer.") for name in read_npz(path))
        return transformers_logits.NAME if logits else vllm_ids.NAME
    return next(name for name, module in FORMATS.items() if path.suffix in module.SUFFIXES)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)
