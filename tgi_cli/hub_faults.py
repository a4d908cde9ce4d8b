"""What went wrong between us and the hub, as one sentence and a way out.

Turns the exceptions of `huggingface_hub`, of its HTTP client and of the file system into the
`HubError` family. Knows nothing of which files were wanted.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tgi_cli.errors import DiskFull, GatedModel, HubError, HubOffline, ModelMissing


@contextmanager
def explained(
    repo: str, *, revision: str | None, token: str | None, folder: Path
) -> Iterator[None]:
    """Turn what the hub's client or the disk raises inside into a `HubError` about `repo`."""
    try:
        yield
    except HubError:
        raise
    except (httpx2.HTTPError, HfHubHTTPError, HFValidationError, JSONDecodeError, OSError) as error:
        raise explain(error, repo, revision=revision, token=token, folder=folder) from error


def explain(
    error: Exception, repo: str, *, revision: str | None, token: str | None, folder: Path
) -> HubError:
    """Say in one sentence what `error`, met while fetching `repo` into `folder`, means."""
    has_token = bool(token or get_token())
    page = f"{constants.ENDPOINT}/{repo}"
    match error:
        case GatedRepoError() if has_token:
            return GatedModel(
                f"{repo!r} is gated, and this token's account has no access to it",
                hint=f"request access at {page}, then run this again",
            )
        case GatedRepoError():
            return GatedModel(
                f"{repo!r} is gated: its owner gives access on request",
                hint=f"request access at {page}, then set HF_TOKEN (or pass --token)",
            )
        case RevisionNotFoundError():
            return ModelMissing(
                f"{repo!r} has no revision {revision!r}",
                hint=f"branches and tags are listed at {page}/tree/main; leave --revision away for"
                " the newest",
            )
        case RepositoryNotFoundError() | EntryNotFoundError() if not isinstance(
            error, LocalEntryNotFoundError
        ):
            return _missing(error, repo, has_token)
        case HFValidationError():
            return ModelMissing(
                f"{repo!r} is neither a file or folder here nor a model id",
                hint="a model id looks like org/name (or org/name:QUANT for GGUF), or is `demo`",
            )
        case JSONDecodeError():
            return HubError(
                f"{constants.ENDPOINT} does not answer like a hub when asked for {repo!r}",
                hint="check HF_ENDPOINT; a proxy or a network's log-in page may be in between",
            )
        case OfflineModeIsEnabled():
            return not_cached(repo)
        case HfHubHTTPError():
            return _status(error, repo)
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return disk_full(repo, None, folder)
        case OSError() if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return HubError(
                f"cannot write to the cache at {str(folder)!r}: {error.strerror}",
                hint="point --cache-dir (or HF_HOME) at a folder you may write to",
            )
    if isinstance(error, OSError) and not isinstance(
        error, (httpx2.HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)
    ):
        return HubError(f"cannot keep {repo!r} in {str(folder)!r}: {error}")
    return unreachable(repo, error)


def not_cached(model_id: str, *, whole: bool = True) -> HubOffline:
    """Say that the hub is not to be asked and the cache has no (or no whole) copy."""
    lack = "is not in the cache" if whole else "is only in part in the cache"
    return HubOffline(
        f"{model_id!r} {lack}, and HF_HUB_OFFLINE is set",
        hint=f"unset HF_HUB_OFFLINE and run `tgi download {model_id}` once",
    )


def unreachable(repo: str, error: BaseException) -> HubOffline:
    """Say that the hub does not answer and that the cache cannot stand in."""
    cause = error.__cause__ or error
    text = str(cause).strip().partition("\n")[0] or type(cause).__name__
    return HubOffline(
        f"cannot fetch {repo!r}: {constants.ENDPOINT} does not answer ({text})",
        hint="check the network, the proxy and HF_ENDPOINT; what has arrived is kept and a new try"
        " goes on from there",
    )


def disk_full(repo: str, needed: int | None, folder: Path) -> DiskFull:
    """Say how much `repo` needs and how much is free where it goes."""
    free = shutil.disk_usage(existing(folder)).free
    amount = f"needs {gigabytes(needed)}" if needed is not None else "does not fit"
    return DiskFull(
        f"{repo!r} {amount}, but {str(folder)!r} has {gigabytes(free)} free",
        hint="make room, or keep the cache on a larger disk: --cache-dir or HF_HOME (for `demo`:"
        " XDG_CACHE_HOME)",
    )


def existing(folder: Path) -> Path:
    """The nearest folder above (or equal to) `folder` that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def gigabytes(size: int) -> str:
    """A size in bytes as people read it: `812 kB`, `4.1 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def _missing(error: Exception, repo: str, has_token: bool) -> HubError:
    if isinstance(error, EntryNotFoundError):
        return ModelMissing(f"a file of {repo!r} is gone from the hub", hint="run this again")
    if has_token:
        return ModelMissing(
            f"there is no model {repo!r} on {constants.ENDPOINT}, or this token may not see it",
            hint="check the spelling and the token's rights",
        )
    return ModelMissing(
        f"there is no model {repo!r} on {constants.ENDPOINT}, or it is private",
        hint="check the spelling; for a private model set HF_TOKEN (or pass --token)",
    )


def _status(error: HfHubHTTPError, repo: str) -> HubError:
    status = error.response.status_code
    if status == 401:
        return GatedModel(
            f"{constants.ENDPOINT} refused the token (401) for {repo!r}",
            hint="make a new one on your account's token page and set HF_TOKEN (or pass --token)",
        )
    if status == 403:
        return GatedModel(
            f"{constants.ENDPOINT} forbids access to {repo!r} (403)",
            hint="check the token's rights, or ask the model's owner",
        )
    if status == 429:
        return HubError(
            f"{constants.ENDPOINT} limits how often we may ask (429)",
            hint="wait a few minutes; with HF_TOKEN set the limit is higher",
        )
    return HubError(
        f"{constants.ENDPOINT} answered {status} for {repo!r}",
        hint="the fault is the hub's; try again later",
    )
