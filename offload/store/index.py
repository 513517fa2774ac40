"""What a folder of converted experts holds, and which checkpoint they were made from.

experts.json        the index: written last, atomically, once a format is complete
nf4.experts         records, layer after layer, expert after expert
nf4.experts.part    the same while it is being written, with
nf4.journal         checksums of the records that are done: where a conversion that was killed goes on
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache.errors import StoreError
from offload.checkpoint.layout import ExpertMap
from offload.checkpoint.shards import ShardIndex
from offload.system.paths import cache_dir, fsync_folder

INDEX = "experts.json"
VERSION = 1


@dataclass(frozen=True)
class Origin:
    """The checkpoint that experts were converted from.

    `digest` covers every tensor's name, type, shape and place, the sizes of the files, the revision, and the dtype that
    the model was given. `modified` are the files' times of modification (ns), `samples` checksums of blocks from all
    over them: where either differ, contents may, too. Older indexes have no samples.
    """

    model: str
    revision: str | None
    digest: str
    modified: dict[str, int]
    samples: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str, revision: str | None, shards: ShardIndex, experts: ExpertMap) -> Origin:
        """Of a checkpoint on this disk. Raises TransferError."""
        digest = hashlib.blake2b(digest_size=16)
        for name, info in sorted(shards.items()):
            digest.update(f"{name} {info.dtype} {info.shape} {Path(info.file).name} {info.offset}\n".encode())
        for file, size in sorted(shards.file_sizes.items()):
            digest.update(f"{Path(file).name} {size}\n".encode())
        digest.update(f"{revision} {[str(p.dtype) for p in experts.layers[0].parameters]}".encode())
        files = {Path(name).name: shards.files[name] for name in sorted({info.file for info in shards.values()})}
        modified = {name: file.modified_ns for name, file in files.items()}
        samples = {name: file.sample() for name, file in files.items()}
        return cls(model, revision, digest.hexdigest(), modified, samples)

    def folder(self) -> Path:
        """Where its converted experts are kept if nobody says: checkpoints in different folders share nothing."""
        digest = self.digest
        if Path(self.model).is_dir():
            digest = hashlib.blake2b(
                f"{digest} {Path(self.model).resolve()}".encode("utf-8", "surrogateescape"), digest_size=16
            ).hexdigest()
        name = re.sub(r"[^A-Za-z0-9.]+", "-", self.model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1])
        return cache_dir() / "experts" / f"{name.strip('-.') or 'model'}-{digest[:12]}"


@dataclass
class Entry:
    """One complete format. Of each layer, bytes of every segment; of each expert, checksums of every segment, and of
    its parameters as the checkpoint has them."""

    file: str
    segments: list[list[int]]
    checksums: list[list[list[int]]]
    sources: list[list[int]]


@dataclass
class StoreIndex:
    """The index of one folder."""

    origin: Origin
    formats: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> StoreIndex | None:
        """The index in `folder`; None if there is none. Raises StoreError for one that cannot be used."""
        path = folder / INDEX
        if os.path.lexists(folder) and not folder.is_dir():
            raise StoreError(f"{folder} is no folder: name one for converted experts")
        try:
            data: Any = json.loads(path.read_bytes())
            if data["format"] != "offload-experts":
                raise ValueError('its "format" is not "offload-experts"')
            if data["version"] != VERSION:
                raise StoreError(
                    f"{path} has version {data['version']}, this program reads version {VERSION}: "
                    "remove the folder, and convert again"
                )
            formats = {name: Entry(**entry) for name, entry in data["formats"].items()}
            for name, entry in formats.items():
                _check(name, entry)
            return cls(Origin(**data["origin"]), formats)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as error:
            raise StoreError(f"{path} may not be read: name another folder for converted experts") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{path} is damaged ({error}): remove the folder, and convert again") from error

    def write(self, folder: Path) -> None:
        """Put it in `folder`, atomically. Raises OSError."""
        data = {
            "format": "offload-experts",
            "version": VERSION,
            "origin": vars(self.origin),
            "formats": {name: vars(entry) for name, entry in sorted(self.formats.items())},
        }
        partial = folder / f"{INDEX}.part"
        with partial.open("w") as file:
            json.dump(data, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / INDEX)
        fsync_folder(folder)


def _check(name: str, entry: Entry) -> None:
    if not len(entry.segments) == len(entry.checksums) == len(entry.sources):
        raise ValueError(f"{name}: layers are missing")
    for segments, checksums, sources in zip(entry.segments, entry.checksums, entry.sources, strict=True):
        if len(checksums) != len(sources) or any(len(each) != len(segments) for each in checksums):
            raise ValueError(f"{name}: checksums are missing")
    if Path(entry.file).name != entry.file:
        raise ValueError(f"{name}: its file is elsewhere")
