"""From what the user calls a model to a path on this machine, fetched first if need be.

A model id is one of: a local folder, a local `.gguf` file, `demo`, a repository on the hub
(`org/name`), or one quantization of a GGUF repository (`org/name:Q4_K_M`). Weights that exist only
as pickled `.bin` files are converted to safetensors once, in a process of its own: that needs
torch, which this layer does not import, and it gives the memory back.

Knows nothing of what is inside the files. The environment (HF_TOKEN, HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE, HUGGINGFACE_HUB_CACHE) is read by `huggingface_hub`.
"""

from __future__ import annotations

import glob
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    is_offline_mode,
    snapshot_download,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
)
from huggingface_hub.hf_api import BlobLfsInfo
from huggingface_hub.utils import tqdm

from tgi_cli import demo_model, hub_faults
from tgi_cli.errors import HubOffline, ModelMissing
from tgi_cli.hub_conversion import convert_pickles
from tgi_cli.hub_files import RepoFile, Selection, select
from tgi_cli.hub_transfer import Listener, Progress, Transfer

logger = logging.getLogger(__name__)

_API_TIMEOUT = 15.0  # seconds for one question to the hub


@dataclass(frozen=True, slots=True)
class Download:
    """A model on this machine: what `open_checkpoint` takes, and what it is made of."""

    model_id: str
    path: Path  # a folder, or a .gguf file
    folder: Path
    files: tuple[str, ...]  # relative to `folder`
    commit: str | None = None  # of the hub's repository


def resolve(
    model_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[float], None] | None = None,
    offline: bool | None = None,
) -> Path:
    """Return the folder or `.gguf` file of `model_id`, fetched if it is not here yet.

    `progress` gets the fraction of bytes that are here, 0 to 1, possibly from other threads.
    `offline` None means as HF_HUB_OFFLINE says.

    Raises:
        ModelMissing: no such model, revision, quantization or file.
        GatedModel: access must be requested, or the token is lacking or wrong.
        HubOffline: not in the cache, and the hub does not answer or is not to be asked.
        DiskFull: it does not fit.
        HubError: anything else between us and the hub.
    """
    listener = None if progress is None else _Fraction(progress)
    return download(
        model_id,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        listener=listener,
        offline=offline,
    ).path


def download(
    model_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    listener: Listener | None = None,
    offline: bool | None = None,
) -> Download:
    """Like `resolve`, with globs over the repository's files and one report per file.

    With `include` the files are fetched as they are and `path` is their folder. `listener` gets a
    `Progress` per file and step, from several threads but one at a time. Raises as `resolve`.
    """
    listener = listener or _ignore
    offline = is_offline_mode() if offline is None else offline
    if model_id == demo_model.DEMO_MODEL_ID:
        path = demo_model.fetch(demo_model.DEMO_MODEL, listener=listener, offline=offline)
        return Download(model_id, path, path.parent, (path.name,))
    local = _local_path(model_id)
    if local is not None:
        return _local(model_id, *local, listener)
    if _looks_like_path(model_id):
        raise ModelMissing(
            f"there is no file or folder {model_id!r}",
            hint="a model on the hub is written org/name; the demo model is `demo`",
        )
    repo, _, quant = model_id.partition(":")
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    choose = partial(select, repo, quant=quant or None, include=include, exclude=exclude)
    source = _Repository(model_id, repo, revision, token, cache, choose, listener)
    with hub_faults.explained(repo, revision=revision, token=token, folder=cache):
        return source.cached() if offline else source.fetched()


@dataclass(frozen=True, slots=True)
class _Repository:
    """One repository on the hub and its copy in the cache."""

    model_id: str
    repo: str
    revision: str | None
    token: str | None
    cache: Path
    choose: Callable[[Sequence[RepoFile]], Selection]
    listener: Listener

    def fetched(self) -> Download:
        """Bring the cache up to date with the hub; without network, make do with the cache."""
        try:
            info = HfApi(token=self.token).model_info(
                self.repo, revision=self.revision, files_metadata=True, timeout=_API_TIMEOUT
            )
        except httpx2.TransportError as error:
            return self._cached_instead(error)
        assert info.sha is not None
        selection = self.choose(
            [
                RepoFile(file.rfilename, file.size or 0, _sha256(file.lfs))
                for file in info.siblings or ()
            ]
        )
        transfer = Transfer(self.repo, info.sha, self.cache, self.token)
        self._check_room(transfer, selection)
        transfer.fetch(selection.files, self.listener)
        # Everything is here: this only notes the branch and the listing, for use without network.
        folder = self._snapshot(selection, offline=False)
        return self._finish(folder, selection)

    def cached(self) -> Download:
        """The copy in the cache, if it is whole."""
        try:
            listing = get_cached_repo_tree(self.repo, revision=self.revision, cache_dir=self.cache)
            files = [RepoFile(file.path, file.size) for file in listing]
        except CachedRepoTreeNotFoundError:  # fetched by a client that kept no listing
            files = _listed(self._snapshot(None, offline=True))
        selection = self.choose(files)
        return self._finish(self._snapshot(selection, offline=True), selection)

    def _cached_instead(self, error: Exception) -> Download:
        try:
            found = self.cached()
        except (HubOffline, ModelMissing):
            raise hub_faults.unreachable(self.repo, error) from error
        logger.warning("the hub does not answer; using the copy of %s in the cache", self.repo)
        return found

    def _snapshot(self, selection: Selection | None, *, offline: bool) -> Path:
        names = None if selection is None else [glob.escape(f.name) for f in selection.files]
        bar: Any = partial(tqdm, disable=True)  # typed as a class, but any callable will do
        try:
            return Path(
                snapshot_download(
                    self.repo,
                    revision=self.revision,
                    cache_dir=self.cache,
                    token=self.token,
                    allow_patterns=names,
                    local_files_only=offline,
                    tqdm_class=bar,
                )
            )
        except LocalEntryNotFoundError as error:
            if offline:
                whole = not isinstance(error, IncompleteSnapshotError)
                raise hub_faults.not_cached(self.model_id, whole=whole) from error
            raise

    def _check_room(self, transfer: Transfer, selection: Selection) -> None:
        needed = sum(file.size - transfer.present(file) for file in selection.files)
        needed += sum(file.size for file in selection.pickles)  # for what they are converted to
        free = shutil.disk_usage(hub_faults.existing(self.cache)).free
        if needed > free:
            raise hub_faults.disk_full(self.model_id, needed, self.cache)

    def _finish(self, folder: Path, selection: Selection) -> Download:
        path = _usable(folder, selection, self.listener)
        names = tuple(file.name for file in selection.files)
        return Download(self.model_id, path, folder, names, folder.name)


def _local_path(model_id: str) -> tuple[Path, str | None] | None:
    """The file or folder that `model_id` names, and the quantization if it is `folder:QUANT`."""
    path = Path(model_id).expanduser()
    if model_id and path.exists():
        return path, None
    head, _, quant = model_id.rpartition(":")
    folder = Path(head).expanduser()
    return (folder, quant) if head and folder.is_dir() else None


def _local(model_id: str, path: Path, quant: str | None, listener: Listener) -> Download:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelMissing(
                f"{model_id!r} is a file, but not a .gguf one",
                hint="name the folder that holds config.json and the weights",
            )
        return Download(model_id, path, path.parent, (path.name,))
    selection = select(str(path), _listed(path), quant=quant)
    names = tuple(file.name for file in selection.files)
    return Download(model_id, _usable(path, selection, listener), path, names)


def _usable(folder: Path, selection: Selection, listener: Listener) -> Path:
    """What a checkpoint reader can open, after converting pickles if there is nothing else."""
    if selection.gguf is not None:
        return folder / selection.gguf
    if selection.pickles:
        convert_pickles(folder, [file.name for file in selection.pickles], listener)
    return folder


def _listed(folder: Path) -> list[RepoFile]:
    return [RepoFile(p.name, p.stat().st_size) for p in sorted(folder.iterdir()) if p.is_file()]


def _sha256(lfs: BlobLfsInfo | None) -> str | None:
    # It becomes a file name, so nothing else is taken from a server for one.
    return lfs.sha256 if lfs and re.fullmatch(r"[0-9a-f]{64}", lfs.sha256) else None


def _looks_like_path(model_id: str) -> bool:
    return model_id.startswith(("/", "./", "../", "~")) or model_id.endswith(".gguf")


def _ignore(_progress: Progress) -> None:
    """Listen to nothing."""


class _Fraction:
    """Turns reports on files into one fraction of all bytes."""

    def __init__(self, progress: Callable[[float], None]) -> None:
        self._progress = progress
        self._files: dict[str, Progress] = {}

    def __call__(self, report: Progress) -> None:
        if report.stage == "download":
            self._files[report.name] = report
            total = sum(file.total for file in self._files.values())
            done = sum(file.done for file in self._files.values())
            self._progress(done / total if total else 1.0)
