"""Files of a hub repository on their way into the Hugging Face cache, continuing where a killed run stopped.

The layout is huggingface_hub's own, so other tools find and clean up what we download: `blobs/<etag>` holds the bytes,
`snapshots/<commit>/<name>` links there. The transfer is ours, because with huggingface_hub 2.4 users would lose what
has arrived: it writes to a file name that no later process knows, and deletes that when it is interrupted. It also
compares no digest, and only warns of a disk that is too small. Ours appends to one partial file per blob, and what was
continued must in the end have the digest that the hub states.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cache.errors import CheckpointError, DiskSpaceError
from offload.system.paths import exclusive
from offload.system.progress import progress_bar
from offload.system.sizes import format_bytes

_PARTIAL_SUFFIX = ".offload.incomplete"
_CHUNK_BYTES = 256 * 1024  # what each running transfer can lose when it is killed
_TRANSFERS = 4
_ATTEMPTS = 5  # in a row, without one new byte
_MAX_WAIT_S = 8
_BUSY_STATUSES = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at the hub: its name in the repository, address, bytes and etag.

    The etag is the SHA-256 of the contents (64 hex digits) for large files, else a git object id (40).
    """

    name: str
    url: str
    size: int
    etag: str


class Snapshot:
    """One commit of a hub repository in the cache. Nothing is created before the first download."""

    def __init__(self, storage: Path, commit: str) -> None:
        self.storage = storage
        self.folder = storage / "snapshots" / commit

    def find(self, file: RemoteFile) -> Path | None:
        """Where the whole file is on this disk, or None."""
        for path in (self.folder / file.name, self._blob(file)):
            if path.is_file() and path.stat().st_size == file.size:
                return path
        return None

    def missing_bytes(self, files: Iterable[RemoteFile]) -> int:
        """Bytes that `download` would still transfer for `files`."""
        blobs = {file.etag: file for file in files if self.find(file) is None}
        return sum(max(0, file.size - _size(self._partial(file))) for file in blobs.values())

    def download(self, files: Iterable[RemoteFile], *, label: str = "", progress: bool = False) -> None:
        """Bring `files` into the snapshot, several at a time; waits while another process does so.

        Raises DiskSpaceError before the first byte when they do not fit the disk, CheckpointError when the
        hub sends something else than it announced, and whatever httpx2 and huggingface_hub raise when it
        cannot be reached. What has arrived by then stays, and is continued by the next call.
        """
        todo = [file for file in files if self.find(file) != self.folder / file.name]
        if not todo:
            return
        lock = self.storage.parent / ".locks" / self.storage.name / "offload.lock"
        (self.storage / "blobs").mkdir(parents=True, exist_ok=True)
        with exclusive(lock):
            missing = self.missing_bytes(todo)
            self._check_space(missing)
            same_etag: dict[str, list[RemoteFile]] = {}
            for file in todo:
                same_etag.setdefault(file.etag, []).append(file)
            total = sum(same[0].size for same in same_etag.values())
            with (
                progress_bar(label, total, unit="bytes", done=total - missing, show=progress, keep=True) as bar,
                parallel(_TRANSFERS) as (pool, stop),
            ):
                running = [pool.submit(self._bring, same, bar.advance, stop) for same in same_etag.values()]
                for future in as_completed(running):
                    future.result()

    def _blob(self, file: RemoteFile) -> Path:
        return self.storage / "blobs" / file.etag

    def _partial(self, file: RemoteFile) -> Path:
        return self.storage / "blobs" / (file.etag + _PARTIAL_SUFFIX)

    def _check_space(self, missing: int) -> None:
        free = shutil.disk_usage(self.storage).free
        if missing > free:
            raise DiskSpaceError(
                f"the download needs {format_bytes(missing)} more, but {self.storage.parent} has only "
                f"{format_bytes(free)} free: free some space, or set HF_HOME to a folder on a larger disk"
            )

    def _bring(self, same: list[RemoteFile], advance: Callable[[int], None], stop: threading.Event) -> None:
        """Complete the files of one etag and put them in their places in the snapshot."""
        for file in same:
            if self.find(file) is None:
                partial = self._partial(file)
                continued = _size(partial) > 0
                _complete(file, partial, advance, stop)
                if continued and not _is_intact(partial, file):
                    partial.unlink()
                    advance(-file.size)
                    _complete(file, partial, advance, stop)
                partial.replace(self._blob(file))
            self._link(file)

    def _link(self, file: RemoteFile) -> None:
        pointer, blob = self.folder / file.name, self._blob(file)
        if self.find(file) == pointer:
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:  # no symlinks here, as on most Windows machines: the snapshot itself holds the bytes
            blob.replace(pointer)


@contextmanager
def parallel(workers: int) -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """A pool of threads, and an event for `receive` that ends their work as soon as the block is left."""
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield pool, stop
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def receive(file: RemoteFile, begin: int, end: int, write: Callable[[bytes], object], stop: threading.Event) -> None:
    """Hand the bytes from `begin` to `end` of a file at the hub to `write`, as they arrive.

    A broken connection is taken up again where it broke; when that fails too often in a row, the error is
    raised. Raises CancelledError soon after `stop` is set.
    """
    failures = 0
    while begin < end:
        done, error = _receive_once(file, begin, end, write, stop)
        if stop.is_set() and done < end:
            raise CancelledError
        failures = failures + 1 if done == begin else 0
        if failures == _ATTEMPTS:
            raise error or CheckpointError(f"{file.url}: sends nothing after byte {begin}: try again")
        if error is not None:
            stop.wait(min(2**failures, _MAX_WAIT_S))
        begin = done


def _receive_once(
    file: RemoteFile, begin: int, end: int, write: Callable[[bytes], object], stop: threading.Event
) -> tuple[int, Exception | None]:
    """One request of `receive`: how far it got, and why no further if trying again makes sense."""
    import httpx2
    from huggingface_hub import constants, get_session, hf_raise_for_status
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    done = begin
    try:
        with get_session().stream("GET", file.url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else begin  # a server that only sends whole files
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                wanted = chunk[skip : skip + end - done]
                skip = max(0, skip - len(chunk))
                write(wanted)
                done += len(wanted)
                if stop.is_set() or (done == end and response.status_code != 206):
                    break
    except httpx2.TransportError as error:
        return done, error
    except HfHubHTTPError as error:
        if error.response.status_code not in _BUSY_STATUSES:
            raise
        return done, error
    return done, None


def _complete(file: RemoteFile, partial: Path, advance: Callable[[int], None], stop: threading.Event) -> None:
    """Append to `partial` what it lacks of `file`, and flush it to the disk."""
    with partial.open("ab", buffering=0) as output:

        def write(chunk: bytes) -> None:
            output.write(chunk)
            advance(len(chunk))

        receive(file, output.tell(), file.size, write, stop)
        os.fsync(output.fileno())  # what looks finished must be so even after a power cut


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _is_intact(path: Path, file: RemoteFile) -> bool:
    """Whether the contents at `path` have the digest that the hub stated."""
    if len(file.etag) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)  # how git names contents
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == file.etag
