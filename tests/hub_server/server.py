"""A server on loopback that speaks the Hub's protocol as `huggingface_hub` 2.x uses it.

Two listeners, as in life: the hub itself and a storage host that large files are redirected to.
Connections can be cut and slowed down; every request and every byte sent is noted.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_good_token"


@dataclass
class File:
    """One file. A large one (`lfs`) lives on the storage host and is named by its SHA-256."""

    data: bytes
    lfs: bool = False
    declared_size: int | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self) -> str:
        header = f"blob {len(self.data)}\0".encode()
        return hashlib.sha1(header + self.data).hexdigest()

    @property
    def size(self) -> int:
        return len(self.data) if self.declared_size is None else self.declared_size

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass
class Repo:
    """A model; one whose name begins with `datasets/` is a data set."""

    files: dict[str, File]
    gated: bool = False  # nobody has been let in
    private: bool = False  # only TOKEN may see it
    commit: str = "a" * 40
    refs: dict[str, str] = field(default_factory=dict)

    def has(self, revision: str) -> bool:
        return revision in ("main", self.commit) or revision in self.refs


@dataclass
class Served:
    """One answered request for a file's bytes."""

    name: str
    start: int
    sent: int = 0
    authorized: bool = False


@dataclass
class Hub:
    """What is served, what goes wrong, and what has happened."""

    repos: dict[str, Repo] = field(default_factory=dict)
    cut_at: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes after which to drop
    corrupt: dict[str, int] = field(default_factory=dict)  # file -> how many answers to damage
    delay: float = 0.0  # seconds before each piece
    piece: int = 1 << 16
    ranges: bool = True  # whether Range requests are honoured
    down: bool = False  # every request is answered 503
    portal: bool = False  # every request is answered by a network's log-in page
    served: list[Served] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    storage_url: str = ""
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sent(self, name: str) -> int:
        return sum(answer.sent for answer in self.served if answer.name == name)

    @contextmanager
    def sending(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_args: Any) -> None:
        """Be silent."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {url.path}")
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if self.hub.down:
            self._refuse(503, None)
        elif self.hub.portal:
            self._reply(200, b"<html>please log in</html>", {"Content-Type": "text/html"})
        elif parts[0] == "storage":
            self._send_stored(parts[1])
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:], parse_qs(url.query))
        elif parts[:2] == ["api", "datasets"]:
            self._api("/".join(parts[1:4]), parts[4:], parse_qs(url.query))
        elif "resolve" in parts:
            at = parts.index("resolve")
            self._resolve("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        else:
            self._refuse(404, None)

    @property
    def _token(self) -> str | None:
        header = self.headers.get("Authorization")
        return header.removeprefix("Bearer ") if header else None

    def _repo(self, name: str, revision: str) -> Repo | None:
        """The repository, or None when a refusal has been sent."""
        if self._token not in (None, TOKEN):
            self._refuse(401, None, "Invalid credentials in Authorization header")
            return None
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._token != TOKEN):
            # Who is not signed in must not learn whether a private repository exists.
            self._refuse(404 if self._token else 401, "RepoNotFound", "Repository not found")
            return None
        if not repo.has(revision):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo

    def _api(self, name: str, rest: list[str], query: dict[str, list[str]]) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        repo = self._repo(name, revision)
        if repo is None:
            return
        if rest[:1] == ["tree"]:
            self._json([self._tree_entry(path, file) for path, file in repo.files.items()])
            return
        blobs = query.get("blobs") == ["true"]
        self._json(
            {
                "_id": "1",
                "id": name,
                "modelId": name,
                "sha": repo.commit,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [self._sibling(path, file, blobs) for path, file in repo.files.items()],
            }
        )

    @staticmethod
    def _sibling(name: str, file: File, blobs: bool) -> dict[str, Any]:
        if not blobs:
            return {"rfilename": name}
        entry: dict[str, Any] = {"rfilename": name, "size": file.size, "blobId": file.blob_id}
        if file.lfs:
            entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 130}
        return entry

    @staticmethod
    def _tree_entry(name: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": name,
            "size": file.size,
            "oid": file.blob_id,
        }
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
        return entry

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        file = repo.files.get(path)
        if repo.gated:
            status = 403 if self._token else 401
            self._refuse(status, "GatedRepo", f"Access to model {name} is restricted.")
        elif file is None:
            self._refuse(404, "EntryNotFound", "Entry not found", commit=repo.commit)
        elif file.lfs:
            headers = {
                "X-Repo-Commit": repo.commit,
                "X-Linked-Size": str(file.size),
                "X-Linked-ETag": f'"{file.etag}"',
                "Location": f"{self.hub.storage_url}/storage/{file.sha256}?signature=1",
            }
            self._reply(302, b"", headers)
        else:
            headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{file.etag}"'}
            self._send_file(path, file.data, headers)

    def _send_stored(self, sha256: str) -> None:
        stored = [
            (name, file)
            for repo in self.hub.repos.values()
            for name, file in repo.files.items()
            if file.lfs and file.sha256 == sha256
        ]
        if stored:
            name, file = stored[0]
            self._send_file(name, file.data, {"ETag": f'"{sha256}"'})
        else:
            self._refuse(404, None)

    def _send_file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        start, status = 0, 200
        asked = self.headers.get("Range")
        if asked and self.hub.ranges:
            start, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        if self.command == "HEAD":
            self._reply(status, data[start:], headers)
            return
        if self.hub.corrupt.get(name, 0) > 0:
            self.hub.corrupt[name] -= 1
            data = bytes(len(data))
        cuts = self.hub.cut_at.get(name, [])
        stop = cuts.pop(0) if cuts else len(data)
        answer = Served(name, start, authorized=self._token is not None)
        self.hub.served.append(answer)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        with self.hub.sending():
            self._send_pieces(data[start:stop], answer)
        if stop < len(data):
            self.close_connection = True

    def _send_pieces(self, data: bytes, answer: Served) -> None:
        for at in range(0, len(data), self.hub.piece):
            time.sleep(self.hub.delay)
            piece = data[at : at + self.hub.piece]
            try:
                self.wfile.write(piece)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
                break
            answer.sent += len(piece)

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(
        self, status: int, code: str | None, message: str = "", commit: str | None = None
    ) -> None:
        headers = {"X-Error-Message": message} if message else {}
        if code:
            headers["X-Error-Code"] = code
        if commit:
            headers["X-Repo-Commit"] = commit
        self._reply(status, json.dumps({"error": message}).encode(), headers)

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve() -> Iterator[Hub]:
    """Run an empty hub until the block ends."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        for server in servers
    ]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()
