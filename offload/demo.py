"""The demo model: a real Mixture of Experts small enough to build on first use.

SmolLM2-135M-Instruct, carved (see carve.py) into a stock Qwen2-MoE checkpoint in the user's cache folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache.errors import DiskSpaceError, UnknownModelError

from .dense import WHEEL_BYTES, open_dense
from .paths import cache_dir, exclusive, fsync_folder
from .sizes import format_bytes

DATA_FILE = Path(__file__).parent / "data" / "demo-carve.safetensors"
LAYOUT = "1"  # raise it when the same carve must be built anew
CHECKPOINT_BYTES = 275_000_000
_MANIFEST = "offload-demo.json"  # name -> bytes of every file; the last one written
_END_OF_TEXT = 0


def demo_path(progress: bool = False) -> Path:
    """The folder of the demo checkpoint, built first if it is not there (seconds, and a 93 MB download).

    Another process that builds it is waited for. A build that was killed is cleaned up and done again.
    `progress` shows it on stderr. Raises UnknownModelError when the dense weights cannot be had or the cache
    folder cannot be written, DiskSpaceError before anything is written when there is too little room.
    """
    folder = cache_dir() / f"demo-{_fingerprint()}"
    if _is_whole(folder):
        return folder
    try:
        with (
            _shown(progress) as show,
            exclusive(cache_dir() / "demo.lock", lambda: show.say("waiting for a build")),
        ):
            if not _is_whole(folder):
                _build(folder, show)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskSpaceError(f"the disk under {cache_dir()} filled up: free {_needed_text()}") from error
        raise UnknownModelError(
            f"the demo cannot be built under {cache_dir()} ({error.strerror}): set OFFLOAD_CACHE elsewhere"
        ) from error
    return folder


def _fingerprint() -> str:
    """12 hex digits that change with the carve data and with what is built from it."""
    return hashlib.sha256(LAYOUT.encode() + DATA_FILE.read_bytes()).hexdigest()[:12]


def _is_whole(folder: Path) -> bool:
    """Whether every file that the build wrote is there at its full size."""
    try:
        files: dict[str, int] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False


def _build(folder: Path, show: _Progress) -> None:
    """Build `folder` in a sibling and rename it there. The caller holds the lock."""
    for leftover in cache_dir().glob("demo-*.building"):
        shutil.rmtree(leftover)
    shutil.rmtree(folder, ignore_errors=True)  # one that is not whole
    _check_room()
    building = folder.with_name(folder.name + ".building")
    building.mkdir()
    try:
        show.say("fetching SmolLM2-135M-Instruct (93 MB)")
        _write(open_dense(), building, show)
        building.replace(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write(dense: Any, folder: Path, show: _Progress) -> None:
    """Write the carved checkpoint of `dense` into `folder`: about 400 MB of RAM at its peak."""
    from safetensors.torch import save_file

    from .carve import Carve

    carve = Carve(DATA_FILE)
    config = dense.config()
    layers = config["num_hidden_layers"]
    tensors = {}
    for name, tensor in carve.apply(dense):
        if name.endswith("input_layernorm.weight"):
            show.say("carving it into experts", share=int(name.split(".")[2]) / layers)
        tensors[name] = tensor
    show.say("writing the checkpoint", share=1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"], _END_OF_TEXT],
        "pad_token_id": config["pad_token_id"],
    }
    for name, content in (("config", carve.moe_config(config)), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    dense.save_tokenizer(folder)
    manifest = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)


def _check_room() -> None:
    free = shutil.disk_usage(cache_dir()).free
    if free < _needed_bytes():
        raise DiskSpaceError(
            f"the demo needs {_needed_text()} under {cache_dir()}, {format_bytes(free)} are free: "
            "free some or set OFFLOAD_CACHE to another disk"
        )


def _needed_bytes() -> int:
    return WHEEL_BYTES + CHECKPOINT_BYTES


def _needed_text() -> str:
    return format_bytes(_needed_bytes())


class _Progress:
    """One line on stderr: what is being done, and how far it is; silent without a `bar`."""

    def __init__(self, bar: Any = None) -> None:
        self._bar = bar
        self._task = None if bar is None else bar.add_task("preparing the demo model", total=None)

    def say(self, what: str, share: float | None = None) -> None:
        if self._bar is not None:
            total = None if share is None else 1.0
            self._bar.update(self._task, description=what, total=total, completed=share or 0.0)


@contextmanager
def _shown(progress: bool) -> Iterator[_Progress]:
    if not progress:
        yield _Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Progress(bar)
