"""Files of a checkpoint that are no files: devices, pipes and sockets, which may never end or never begin."""

from __future__ import annotations

import stat
from pathlib import Path

from cache.errors import CheckpointError

_KINDS = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
_READ = (".json", ".jinja", ".model", ".py", ".safetensors", ".tiktoken", ".txt")
_MORE_TEMPLATES = "additional_chat_templates"


def refuse_special_files(folder: Path) -> None:
    """Raises CheckpointError if anything in `folder` that is read of a checkpoint is neither a file nor a folder.

    A link counts as what it leads to, and one that leads nowhere as nothing.
    """
    for path in sorted((*folder.glob("*"), *folder.glob(f"{_MORE_TEMPLATES}/*"))):
        kind = _kind(path) if path.suffix in _READ else None
        if kind is not None:
            raise CheckpointError(f"{path} is {kind}, not a file: copy the checkpoint's own file there")


def _kind(path: Path) -> str | None:
    """What it is instead of a file or a folder; None for what is not there."""
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except OSError:
        return None
