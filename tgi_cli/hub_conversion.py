"""Have pickled weights converted to safetensors, once, next to where they are.

The work is done by `tgi_cli.model.bin_conversion` in a process of its own: it needs torch, holds
whole files in memory and reads data that strangers wrote. This side starts it, relays its progress
and leaves a marker that says which files the result was made from.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tgi_cli.errors import CheckpointError
from tgi_cli.hub_faults import disk_full
from tgi_cli.hub_transfer import Listener, Progress

MARKER = ".tgi-conversion.json"


def convert_pickles(folder: Path, names: Sequence[str], listener: Listener) -> None:
    """Convert the `.bin` files `names` in `folder`, unless that has been done.

    Raises:
        CheckpointError: a file is not a plain pickle of tensors, or the copy differs from it.
        DiskFull: there is no room for the copy.
    """
    sources = {name: (folder / name).stat().st_size for name in names}
    if _is_done(folder, sources):
        return
    written = _run(folder, names, listener)
    _marker(folder).write_text(json.dumps({"sources": sources, "files": written}))


def _marker(folder: Path) -> Path:
    return folder / MARKER


def _is_done(folder: Path, sources: dict[str, int]) -> bool:
    try:
        note = json.loads(_marker(folder).read_text())
        return bool(
            note["sources"] == sources and all((folder / name).is_file() for name in note["files"])
        )
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _run(folder: Path, names: Sequence[str], listener: Listener) -> list[str]:
    command = [sys.executable, "-m", "tgi_cli.model.bin_conversion", str(folder), *names]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        try:
            outcome = _relay(child.stdout, listener)
        except BaseException:
            child.kill()
            raise
    if "files" in outcome:
        return [str(name) for name in outcome["files"]]
    if outcome.get("disk_full"):
        raise disk_full(str(folder), None, folder)
    reason = outcome.get("error") or f"the conversion ended with exit code {child.returncode}"
    raise CheckpointError(
        str(reason), hint="use a repository with safetensors weights, or another revision"
    )


def _relay(lines: Iterable[str], listener: Listener) -> dict[str, Any]:
    """Report the child's progress as it comes and return how it ended."""
    outcome: dict[str, Any] = {}
    for line in lines:
        try:
            said = json.loads(line)
        except ValueError:  # a warning, or the end of a traceback
            outcome = {"error": line.strip()} if line.strip() else outcome
            continue
        if "done" in said:
            listener(Progress("convert", said["name"], said["done"], said["total"]))
        else:
            outcome = said
    return outcome
