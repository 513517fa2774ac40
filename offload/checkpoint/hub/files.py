"""Where a model's files are: a folder on this disk, or a repository of the Hugging Face hub and its cache.

`describe` reads the config and the shards' headers only, `fetch` brings everything. Both follow the settings
of huggingface_hub: HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from cache.errors import CheckpointError, OffloadError, UnknownModelError
from offload.checkpoint.adapters import adapter_alone
from offload.checkpoint.hub.address import id_and_revision, stored_snapshot
from offload.checkpoint.hub.connection import check_before_request, hub_errors, not_a_hub
from offload.checkpoint.hub.download import RemoteFile, Snapshot, parallel, receive
from offload.checkpoint.hub.pointers import refuse_pointers
from offload.checkpoint.hub.special import refuse_special_files
from offload.checkpoint.shards import INDEX_NAME, ShardIndex, data_start, read_header, read_weight_map, select_shards

_CONFIG_NAME = "config.json"
_PLAN_FILES = (_CONFIG_NAME, "generation_config.json", INDEX_NAME)
_TOKENIZER_FILES = (
    *("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json"),
)
_PLAIN_NAME = re.compile(r"[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_HEADER_GUESS_BYTES = 64 * 1024  # covers most headers in one request
_HEADER_GUESS_SHARE = 1 / 512  # but of a small shard ask no more than this
_HEADER_REQUESTS = 8


@dataclass(frozen=True)
class Source:
    """A model's files, located.

    name: what the user typed.
    folder: holds config.json and what belongs to it; for a local model the folder itself.
    index: all tensors, from the shards' headers.
    local: whether the weights are on this disk, so that the index leads to them.
    revision: commit hash of a hub model.
    download_bytes: what `fetch` would still transfer.
    """

    name: str
    folder: Path
    index: ShardIndex
    local: bool
    revision: str | None
    download_bytes: int


def describe(model: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Source:
    """Locate `model`, a folder or a hub id, from its config and its shards' headers, without any weights.

    In offline mode, with `local_files_only`, or when the hub cannot be reached, a hub model must be in the
    cache completely. Raises UnknownModelError if there is no such model, CheckpointError if it is damaged.
    """
    return _locate(model, revision, local_files_only, download=False, progress=False)


def fetch(
    model: str | Path, *, revision: str | None = None, local_files_only: bool = False, progress: bool = False
) -> Source:
    """Like `describe`, and with all weights and the tokenizer on this disk: downloads what the cache lacks.

    However it is interrupted, a later call continues where it stopped. `progress` shows a bar on stderr.
    Raises DiskSpaceError, too: before the first byte of weights, when the rest does not fit the disk.
    """
    return _locate(model, revision, local_files_only, download=True, progress=progress)


def _locate(
    model: str | Path, revision: str | None, local_files_only: bool, *, download: bool, progress: bool
) -> Source:
    from huggingface_hub import constants

    folder = _local_folder(model)
    if folder is not None:
        snapshot = stored_snapshot(folder, revision)
        if revision is not None and snapshot is None:
            raise UnknownModelError(f'{model} is a folder here, which has no revision "{revision}": leave it out')
        return _on_disk(str(model), snapshot or folder, None if snapshot is None else snapshot.name)
    name, revision = _id(model, revision)
    if local_files_only or constants.is_offline_mode():
        return _cached(name, revision)
    try:
        repository = _Repository(name, revision)
    except UnknownModelError as error:
        try:
            return _cached(name, revision)
        except OffloadError:
            raise error from None
    return repository.fetch(progress) if download else repository.describe()


def _local_folder(model: str | Path) -> Path | None:
    """The folder that `model` names, or None if there is none. Raises UnknownModelError for a file."""
    try:
        folder = Path(model).expanduser()
        if folder.is_file():
            raise UnknownModelError(f"{model} is a file: give the folder that holds {_CONFIG_NAME} and the weights")
        return folder.absolute() if str(model) and folder.is_dir() else None
    except (OSError, RuntimeError):  # such as a name too long, or no such "~user"
        return None


def _id(model: str | Path, revision: str | None) -> tuple[str, str | None]:
    """The hub id and the revision that are meant. Raises UnknownModelError for what can be no id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name, revision = id_and_revision(str(model), revision)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UnknownModelError(
            f'there is no folder "{model}" here, and a hub id looks like Qwen/Qwen3-30B-A3B: check the path'
        ) from error
    return name, revision


def _on_disk(name: str, folder: Path, revision: str | None) -> Source:
    """The model in `folder`. Raises UnknownModelError and CheckpointError."""
    refuse_special_files(folder)
    if not (folder / _CONFIG_NAME).is_file():
        adapter = adapter_alone([path.name for path in folder.iterdir()], folder)
        raise UnknownModelError(f"{name} has no {_CONFIG_NAME}: {adapter or 'give the folder of a whole checkpoint'}")
    refuse_pointers(folder, (*_PLAN_FILES, *_TOKENIZER_FILES))
    return Source(name, folder, ShardIndex.from_folder(folder), True, revision, 0)


def _storage(model: str) -> Path:
    """The cache's folder for a hub model."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE).absolute() / repo_folder_name(repo_id=model, repo_type="model")


def _cached(model: str, revision: str | None) -> Source:
    """A hub model as the cache has it, without a request."""
    storage = _storage(model)
    commit = revision or "main"
    if (reference := storage / "refs" / commit).is_file():
        commit = reference.read_text().strip()
    folder = storage / "snapshots" / commit
    if not (folder / _CONFIG_NAME).is_file():
        raise UnknownModelError(
            f"there is no folder {model} here, and {storage.parent} has no copy of that hub model: "
            "check the name, or run once without offline mode"
        )
    return _on_disk(model, folder, commit)


class _Repository:
    """A model repository at the hub, at one commit. Creating it asks the hub for the list of its files."""

    def __init__(self, model: str, revision: str | None) -> None:
        from huggingface_hub import HfApi, constants, hf_hub_url

        self.model = model
        self.reference = revision or "main"
        with hub_errors(model, self.reference):
            check_before_request()
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            try:
                info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=timeout)
            except (ValueError, KeyError, TypeError) as error:
                raise not_a_hub() from error
        self.commit = info.sha or ""
        self.files: dict[str, RemoteFile] = {}
        for file in info.siblings or ():
            url = hf_hub_url(model, file.rfilename, revision=self.commit)
            etag = (file.lfs.sha256 if file.lfs else file.blob_id) or ""
            if file.size is None or not _ETAG.fullmatch(etag) or not _COMMIT.fullmatch(self.commit):
                raise not_a_hub()
            self.files[file.rfilename] = RemoteFile(file.rfilename, url, file.size, etag)
        if _CONFIG_NAME not in self.files:
            adapter = adapter_alone(self.files)
            raise UnknownModelError(
                f"hub model {model} has no {_CONFIG_NAME}: {adapter or 'use a transformers checkpoint'}"
            )
        self.storage = _storage(model)
        self.snapshot = Snapshot(self.storage, self.commit)

    def describe(self) -> Source:
        """The source, after transferring no more than small files and headers."""
        with hub_errors(self.model, self.reference):
            return self._source(*self._plan())

    def fetch(self, progress: bool) -> Source:
        """The source, after transferring every file it needs. Damage is found before the weights are."""
        with hub_errors(self.model, self.reference):
            small, shards, weight_map = self._plan()
            self._source(small, shards, weight_map)
            label = f"Downloading {self.model}"
            self.snapshot.download([*small, *shards], label=label, progress=progress)
            self._remember_reference()
            return self._source(small, shards, weight_map)

    def _plan(self) -> tuple[list[RemoteFile], list[RemoteFile], dict[str, str] | None]:
        """Small files, shards and weight map of the model, after bringing what it takes to know them."""
        plan = self._matching(_PLAN_FILES)
        self.snapshot.download(plan)
        if '"auto_map"' in (self.snapshot.folder / _CONFIG_NAME).read_text("utf-8", "replace"):
            code = self._matching(("*.py",))
            self.snapshot.download(code)
            plan += code
        weight_map = None
        if INDEX_NAME in self.files:
            weight_map = read_weight_map(self.snapshot.folder / INDEX_NAME)
        shards = select_shards(self.files, weight_map, f"hub model {self.model}")
        return plan + self._matching(_TOKENIZER_FILES), [self.files[name] for name in shards], weight_map

    def _source(self, small: list[RemoteFile], shards: list[RemoteFile], weight_map: dict[str, str] | None) -> Source:
        """The source as it is now, from the shards in the cache or else from their headers at the hub."""
        local = not self.snapshot.missing_bytes(shards)
        if local:
            self.snapshot.download(shards)  # transfers nothing, but a killed run may have left links to make
            index = ShardIndex.from_folder(self.snapshot.folder)
        else:
            sizes = {shard.name: shard.size for shard in shards}
            try:
                with parallel(_HEADER_REQUESTS) as (pool, stop):
                    found = pool.map(lambda shard: self._header(shard, stop), shards)
                    headers = dict(zip(sizes, found, strict=True))
                index = ShardIndex.from_headers(headers, sizes, weight_map=weight_map)
            except CheckpointError as error:
                raise CheckpointError(f"hub model {self.model}: {error}") from error
        missing = self.snapshot.missing_bytes([*small, *shards])
        return Source(self.model, self.snapshot.folder, index, local, self.commit, missing)

    def _matching(self, patterns: tuple[str, ...]) -> list[RemoteFile]:
        names = sorted(name for name in self.files if _PLAIN_NAME.fullmatch(name))
        return [self.files[name] for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def _header(self, shard: RemoteFile, stop: threading.Event) -> bytes:
        """A shard's bytes before its tensors, from the cache or in one or two requests."""
        path = self.snapshot.find(shard)
        if path is not None:
            return read_header(path, shard.size)
        header = bytearray()
        guess = max(8, min(_HEADER_GUESS_BYTES, int(shard.size * _HEADER_GUESS_SHARE)))
        receive(shard, 0, min(guess, shard.size), header.extend, stop)
        end = data_start(bytes(header[:8]), shard.size, shard.name)
        receive(shard, len(header), end, header.extend, stop)
        return bytes(header[:end])

    def _remember_reference(self) -> None:
        """Note which commit a branch or tag stands for, so that the cached model is found without network."""
        if self.reference != self.commit:
            reference = self.storage / "refs" / self.reference
            reference.parent.mkdir(parents=True, exist_ok=True)
            temporary = reference.with_name(f"{reference.name}.offload")
            temporary.write_text(self.commit)
            temporary.replace(reference)
