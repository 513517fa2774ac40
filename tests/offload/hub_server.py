"""A stand-in for the hub on localhost: the routes that a model download uses, with faults and counters.

The fixture `running_hub` directs huggingface_hub in this process there; others set HF_ENDPOINT to `HubServer.url`.

Large files (`*.safetensors`) are redirected as the real hub redirects them to its content network.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from offload.checkpoint.hub import download

_CHUNK_BYTES = 64 * 1024


@dataclass
class Request:
    """One GET or HEAD that named a file, or an API call (`file` is empty). `sent` counts the body's bytes."""

    method: str
    path: str
    file: str = ""
    begin: int = 0
    end: int = 0
    status: int = 200
    sent: int = 0
    authorized: bool = False


@dataclass
class Repository:
    """One model repository: its files at `commit`, under the branch names `branches`."""

    files: dict[str, bytes] = field(repr=False)
    commit: str
    branches: tuple[str, ...] = ("main",)
    gated_status: int = 0  # 401 or 403: files are refused although the list is public, as the hub does

    def siblings(self) -> list[dict[str, Any]]:
        return [self._sibling(name) for name in self.files]

    def __post_init__(self) -> None:
        self._etags = {name: _etag(name, content) for name, content in self.files.items()}

    def etag(self, name: str) -> str:
        return self._etags[name]

    def _sibling(self, name: str) -> dict[str, Any]:
        size, etag = len(self.files[name]), self.etag(name)
        entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": etag[:40]}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"sha256": etag, "size": size, "pointerSize": 134}
        return entry


@dataclass
class HubServer:
    """Serves `repositories` until `close`; `url` is what HF_ENDPOINT must be.

    `hold_after`: once so many bytes of shards were sent in all, every longer shard transfer waits for `release`.
    `break_after`: every shard response ends without notice after so many bytes.
    `busy`: so many shard requests are answered with status 503 first.
    `ranges`: whether requests for a part of a file are honoured.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    hold_after: int | None = None
    break_after: int | None = None
    busy: int = 0
    ranges: bool = True

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._closed = False
        self.holding = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def add(self, name: str, files: Mapping[str, bytes], **options: Any) -> Repository:
        commit = hashlib.sha1(repr(sorted(files)).encode(), usedforsecurity=False).hexdigest()
        repository = Repository(dict(files), commit, **options)
        self.repositories[name] = repository
        return repository

    def close(self) -> None:
        self._closed = True  # for the connections that are kept alive
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def hold(self, after: int) -> None:
        """Let `after` more bytes of shards pass, then wait. `holding` is set when that point is reached."""
        self.holding.clear()
        self._released.clear()
        self.hold_after = self.sent(".safetensors") + after

    def release(self) -> None:
        self.hold_after = None
        self._released.set()

    def sent(self, suffix: str = "") -> int:
        """Bytes of response bodies so far, of all requests or of those for files with this suffix."""
        with self._lock:
            return sum(request.sent for request in self.requests if request.file.endswith(suffix))

    def _allow(self, request: Request, count: int) -> None:
        """Count `count` bytes that are about to be sent, waiting while transfers are held."""
        while True:
            with self._lock:
                total = sum(r.sent for r in self.requests if r.file.endswith(".safetensors"))
                if self.hold_after is None or total + count <= self.hold_after:
                    request.sent += count
                    return
            self.holding.set()
            self._released.wait()


def _etag(name: str, content: bytes) -> str:
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _handler_of(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def _serve(self) -> None:
            if hub._closed:
                self.close_connection = True
                return
            path = unquote(urlsplit(self.path).path)
            request = Request(self.command, path, authorized="Authorization" in self.headers)
            with hub._lock:
                hub.requests.append(request)
            try:
                self._route(path, request)
            except ConnectionError:
                self.close_connection = True

        def _route(self, path: str, request: Request) -> None:
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
                repository = self._repository(match[1], match[2] or "main", request)
                if repository is not None:
                    body = {"id": match[1], "sha": repository.commit, "siblings": repository.siblings()}
                    self._send(request, json.dumps(body).encode(), {"Content-Type": "application/json"})
            elif match := re.fullmatch(r"(/cdn)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                cdn, name, revision, file = match.groups()
                repository = self._repository(name, revision, request)
                if repository is None:
                    return None
                request.file = file
                if repository.gated_status:
                    return self._refuse(request, repository.gated_status, "GatedRepo")
                if file not in repository.files:
                    return self._refuse(request, 404, "EntryNotFound")
                headers = {"ETag": f'"{repository.etag(file)}"', "X-Repo-Commit": repository.commit}
                if file.endswith(".safetensors") and not cdn:
                    size = len(repository.files[file])
                    linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(size)}
                    location = {"Location": f"{hub.url}/cdn/{name}/resolve/{revision}/{file}"}
                    self._send(request, b"", headers | linked | location, status=302)
                elif cdn and hub.busy > 0:
                    hub.busy -= 1
                    self._refuse(request, 503, "Busy")
                else:
                    self._send_file(request, repository.files[file], headers)
            else:
                self._refuse(request, 404, "RepoNotFound")
            return None

        def _repository(self, name: str, revision: str, request: Request) -> Repository | None:
            repository = hub.repositories.get(name)
            if repository is None:
                self._refuse(request, 401, "RepoNotFound")
            elif revision not in (repository.commit, *repository.branches):
                self._refuse(request, 404, "RevisionNotFound")
                return None
            return repository

        def _refuse(self, request: Request, status: int, code: str) -> None:
            self._send(request, b"{}", {"X-Error-Code": code}, status=status)

        def _send(self, request: Request, body: bytes, headers: Mapping[str, str], status: int = 200) -> None:
            request.status = status
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                request.sent += len(body)
                self.wfile.write(body)

        def _send_file(self, request: Request, content: bytes, headers: Mapping[str, str]) -> None:
            begin, end = 0, len(content)
            wanted = self.headers.get("Range", "") if hub.ranges else ""
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted):
                begin = int(match[1])
                end = min(end, int(match[2]) + 1) if match[2] else end
                if begin >= end:
                    return self._refuse(request, 416, "RangeNotSatisfiable")
                request.status = 206
            request.begin, request.end = begin, end
            self.send_response(request.status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(end - begin))
            if request.status == 206:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return None
            shard = request.file.endswith(".safetensors")
            for start in range(begin, end, _CHUNK_BYTES):
                chunk = content[start : min(start + _CHUNK_BYTES, end)]
                if shard and hub.break_after is not None and start - begin >= hub.break_after:
                    self.close_connection = True
                    return None
                if shard and end - begin > _CHUNK_BYTES:
                    hub._allow(request, len(chunk))
                else:
                    request.sent += len(chunk)
                self.wfile.write(chunk)
            return None

    return Handler


@pytest.fixture
def running_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on localhost that this process talks to, with an empty cache in `tmp_path / "hub"`."""
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "_MAX_WAIT_S", 0)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.close()
