"""Data sets of the hub as Parquet files on this machine.

The hub keeps a Parquet form of data sets under `refs/convert/parquet`, as
`config/split/0000.parquet` and so on, whatever their own files are. Knows nothing of what is in
the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tgi_cli import hub_faults
from tgi_cli.errors import HubError, HubOffline, ModelMissing, UsageError

_BRANCH = "refs/convert/parquet"
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([^:/]+))?(?::([^:/]+))?")
_PARTIAL = "partial-"  # what splits too large to be converted whole begin with


@dataclass(frozen=True, slots=True)
class DatasetName:
    """`owner/name[:config[:split]]`; None leaves the choice to what the data set has."""

    repo: str
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> DatasetName | None:
        """The name that `text` is, or None if it cannot be one."""
        found = _NAME.fullmatch(text)
        return None if found is None else cls(*found.groups())


def parquet_files(
    name: DatasetName, *, token: str | None = None, cache_dir: str | Path | None = None
) -> Iterator[Path]:
    """Fetch the files of one split, one after the other, each only when it is asked for.

    Raises:
        ModelMissing: there is no such data set.
        UsageError: no such config or split, or several and none is named.
        GatedModel: access must be requested, or the token is lacking or wrong.
        HubOffline: the hub does not answer or is not to be asked.
        HubError: it has no Parquet form, or anything else between us and the hub.
    """
    if is_offline_mode():
        raise HubOffline(
            f"the data set {name.repo!r} cannot be asked for, as HF_HUB_OFFLINE is set",
            hint="unset it, or give a .txt or .jsonl file",
        )
    api = HfApi(token=token)
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    shown = f"datasets/{name.repo}"
    with hub_faults.explained(shown, revision=_BRANCH, token=token, folder=cache):
        for path in _chosen(name, _listed(api, name)):
            yield Path(
                api.hf_hub_download(
                    name.repo, path, repo_type="dataset", revision=_BRANCH, cache_dir=cache
                )
            )


def _listed(api: HfApi, name: DatasetName) -> list[str]:
    try:
        return api.list_repo_files(name.repo, repo_type="dataset", revision=_BRANCH)
    except GatedRepoError:
        raise
    except (RevisionNotFoundError, RemoteEntryNotFoundError) as error:
        raise HubError(
            f"the data set {name.repo!r} has no Parquet form on {constants.ENDPOINT}",
            hint="save its text column as .jsonl and give that file",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelMissing(
            f"there is no data set {name.repo!r} on {constants.ENDPOINT}, or it is private",
            hint="check the spelling; for a private one set HF_TOKEN (or pass --token)",
        ) from error


def _chosen(name: DatasetName, paths: list[str]) -> list[str]:
    """The files of the split that is meant, in their order."""
    parts = [path.split("/") for path in sorted(paths) if path.endswith(".parquet")]
    places = [
        (each[0], each[1].removeprefix(_PARTIAL), "/".join(each)) for each in parts if each[2:]
    ]
    config = _one(name, "config", name.config, {place[0] for place in places}, "default")
    splits = {place[1] for place in places if place[0] == config}
    split = _one(name, "split", name.split, splits, "train")
    return [place[2] for place in places if place[:2] == (config, split)]


def _one(name: DatasetName, kind: str, wanted: str | None, known: set[str], usual: str) -> str:
    """`wanted`, or the usual one, or the only one."""
    if wanted is None and usual in known:
        return usual
    if wanted is None and len(known) == 1:
        return next(iter(known))
    if wanted is not None and wanted in known:
        return wanted
    listed = ", ".join(sorted(known)[:12]) or "none"
    lack = "several; name one" if wanted is None else f"no {kind} {wanted!r}"
    raise UsageError(
        f"the data set {name.repo!r} has {lack}" + (f" {kind}" if wanted is None else ""),
        hint=f"write {name.repo}:CONFIG:SPLIT; its {kind}s: {listed}",
    )
