"""Fetch the files of one repository into the hub's cache, in parallel and resumable.

`huggingface_hub` owns the cache's layout, the small files and the links. Large files are fetched
here, because its own download keeps nothing of a file that was interrupted: we append to
`blobs/<sha256>.incomplete` under the cache's own lock, ask for the rest with a Range request, and
check the SHA-256 before the file takes its final name. Files above 50 GB are not served over plain
HTTP and go through the hub's Xet client.

Knows nothing of models: which files to fetch is decided in `hub_files`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx2
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status, tqdm

from tgi_cli.errors import HubError
from tgi_cli.hub_files import RepoFile

logger = logging.getLogger(__name__)

_REPORT_EVERY = 0.1  # seconds between two reports of one file
_MAX_STALLS = 5  # attempts in a row that bring no byte
_MAX_PLAIN_HTTP = 50_000_000_000  # bytes; the hub's own limit


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one file is, in bytes. `stage` is what is being done with it."""

    stage: str  # download | convert
    name: str
    done: int
    total: int


Listener = Callable[[Progress], None]


class _Cancelled(Exception):
    """Another file failed, or the user interrupted: stop this one too."""


class _Meter:
    """Counts one file's bytes and reports them, not too often; the point where threads stop."""

    def __init__(self, file: RepoFile, listener: Listener, cancelled: threading.Event) -> None:
        self._file = file
        self._listener = listener
        self._cancelled = cancelled
        self._last = 0.0
        self.done = 0

    def set(self, done: int) -> None:
        if self._cancelled.is_set():
            raise _Cancelled
        self.done = done
        now = time.monotonic()
        if done >= self._file.size or now - self._last >= _REPORT_EVERY:
            self._last = now
            self._listener(Progress("download", self._file.name, done, self._file.size))


class _MeterBar(tqdm):
    """The bar that `huggingface_hub` wants to draw, as a feed for a `_Meter`."""

    def __init__(self, *args: Any, meter: _Meter, initial: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, disable=True)  # type: ignore[no-untyped-call]
        self._meter = meter
        if initial:
            meter.set(initial)

    def update(self, n: float | None = 1) -> None:
        self._meter.set(self._meter.done + int(n or 0))


@dataclass(frozen=True, slots=True)
class Transfer:
    """Where the files come from and where they go: one commit of one repository, one cache."""

    repo: str
    commit: str
    cache_dir: Path
    token: str | None = None
    max_workers: int = 8

    @property
    def folder(self) -> Path:
        """The repository's folder in the cache."""
        return self.cache_dir / repo_folder_name(repo_id=self.repo, repo_type="model")

    def present(self, file: RepoFile) -> int:
        """Bytes of `file` that are on the disk already, perhaps as an unfinished part."""
        if self._is_cached(file):
            return file.size
        if file.sha256 is None:
            return 0
        blob, part = self._blob(file.sha256), self._part(file.sha256)
        if blob.exists():
            return file.size
        return min(part.stat().st_size, file.size) if part.exists() else 0

    def fetch(self, files: Sequence[RepoFile], listener: Listener) -> None:
        """Fetch what is missing of `files`; the first failure stops all.

        `listener` is called from several threads, one at a time, first once for every file.
        Raises what the hub's client and the disk raise.
        """
        lock, cancelled = threading.Lock(), threading.Event()

        def report(progress: Progress) -> None:
            with lock:
                listener(progress)

        for file in files:
            report(Progress("download", file.name, self.present(file), file.size))
        missing = [file for file in files if not self._is_cached(file)]
        missing.sort(key=lambda file: -file.size)
        with ThreadPoolExecutor(self.max_workers, thread_name_prefix="hub") as pool:
            futures = [
                pool.submit(self._fetch_one, file, _Meter(file, report, cancelled))
                for file in missing
            ]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                cancelled.set()
                for future in futures:
                    future.cancel()
                raise

    def _is_cached(self, file: RepoFile) -> bool:
        found = try_to_load_from_cache(
            self.repo, file.name, cache_dir=self.cache_dir, revision=self.commit
        )
        return isinstance(found, str)

    def _blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def _part(self, sha256: str) -> Path:
        return self.folder / "blobs" / f"{sha256}.incomplete"

    def _fetch_one(self, file: RepoFile, meter: _Meter) -> None:
        if file.sha256 is not None and file.size <= _MAX_PLAIN_HTTP:
            self._fetch_blob(file, file.sha256, meter)
        # Typed as a class, but any callable that makes bars does.
        bar: Any = functools.partial(_MeterBar, meter=meter)
        # Finds the blob just fetched and links it into the snapshot, or fetches the file itself.
        hf_hub_download(
            self.repo,
            file.name,
            revision=self.commit,
            cache_dir=self.cache_dir,
            token=self.token,
            tqdm_class=bar,
        )
        meter.set(file.size)

    def _fetch_blob(self, file: RepoFile, sha256: str, meter: _Meter) -> None:
        blob, part = self._blob(sha256), self._part(sha256)
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock = self.cache_dir / ".locks" / self.folder.name / f"{sha256}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists():
                return
            for _attempt in range(2):
                with part.open("ab") as out:
                    self._append(out, file, meter)
                if _sha256(part) == sha256:
                    part.replace(blob)
                    return
                part.unlink()
                logger.warning("%s arrived damaged and is fetched again", file.name)
        raise HubError(
            f"{file.name} of {self.repo!r} arrived damaged twice: its SHA-256 is not {sha256}",
            hint="a proxy or mirror in between may alter files; see HF_ENDPOINT",
        )

    def _append(self, out: IO[bytes], file: RepoFile, meter: _Meter) -> None:
        """Fetch the rest of `file` to the end of `out`, going on after broken connections."""
        url = hf_hub_url(self.repo, file.name, revision=self.commit)
        if out.tell() > file.size:
            out.truncate(0)
        stalls = 0
        while (before := out.seek(0, 2)) < file.size:
            meter.set(before)
            failure: Exception = HubError(
                f"{file.name} of {self.repo!r} ends at byte {before:,} of {file.size:,}",
                hint="the hub's listing and the file disagree; try again later",
            )
            try:
                # Asked anew each time: the address of the storage host is signed and expires.
                self._stream(out, url, meter)
            except httpx2.TransportError as error:
                failure = error
            except HfHubHTTPError as error:
                if error.response.status_code < 500:
                    raise
                failure = error
            stalls = 0 if out.tell() > before else stalls + 1
            if stalls >= _MAX_STALLS:
                raise failure
            if out.tell() < file.size:
                logger.info("%s: %s; going on at byte %d", file.name, failure, out.tell())
                time.sleep(0.1 * 2**stalls)

    def _stream(self, out: IO[bytes], url: str, meter: _Meter) -> None:
        metadata = get_hf_file_metadata(url, token=self.token)
        headers = build_hf_headers(token=self.token)
        if httpx2.URL(metadata.location).netloc != httpx2.URL(url).netloc:
            headers.pop("authorization", None)  # a storage host must not see the token
        start = out.tell()
        headers |= {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream(
            "GET", metadata.location, headers=headers, timeout=timeout
        ) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                out.truncate(0)
                out.seek(0)
            for chunk in response.iter_raw():
                out.write(chunk)
                meter.set(out.tell())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
