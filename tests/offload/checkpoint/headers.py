"""Headers of tiny checkpoints that say something else of the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def edit_header(folder: Path, pattern: str, edit: Callable[[Entry], object]) -> None:
    """`edit` the header's entry of each tensor whose name `pattern` matches a part of; at least one."""
    shard = folder / "model.safetensors"
    data = shard.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    found = [entry for name, entry in header.items() if name != "__metadata__" and re.search(pattern, name)]
    assert found
    for entry in found:
        edit(entry)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def turn(entry: Entry) -> None:
    """The last two dimensions the other way round."""
    entry["shape"] = [*entry["shape"][:-2], *entry["shape"][:-3:-1]]


def flatten(entry: Entry) -> None:
    """The last two dimensions as one."""
    *outer, rows, columns = entry["shape"]
    entry["shape"] = [*outer, rows * columns]


def reshape(entry: Entry) -> None:
    """Twice as many rows, half as long."""
    *outer, rows, columns = entry["shape"]
    entry["shape"] = [*outer, rows * 2, columns // 2]


def retype(dtype: str) -> Callable[[Entry], None]:
    """Another type of the same size."""

    def edit(entry: Entry) -> None:
        entry["dtype"] = dtype

    return edit
