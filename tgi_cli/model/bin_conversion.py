"""Convert PyTorch's pickled weight files (`.bin`) to safetensors, and prove the copy equal.

`python -m tgi_cli.model.bin_conversion FOLDER FILE...` is run by `hub_conversion`; it prints one
JSON object a line: progress, then the files written or the error. Only tensors are unpickled
(`weights_only`). Tensors that share memory are stored once, under the name that comes first in the
file (a model's state lists its embedding before the head tied to it); the other names go into the
metadata, as `safetensors.torch.save_model` does it.
"""

from __future__ import annotations

import errno
import json
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tgi_cli.errors import CheckpointError

Report = Callable[[str, int, int], None]  # name, bytes done, bytes in all


def convert(folder: Path, names: Sequence[str], report: Report) -> list[str]:
    """Write `names`, found in `folder`, as safetensors beside them and return the new names.

    All files are written and compared before the first takes its final name.

    Raises:
        CheckpointError: a file is damaged or holds something else than tensors, two files hold the
            same tensor, or a tensor read back differs.
        OSError: the disk is full or not writable.
    """
    weight_map: dict[str, str] = {}
    total_size = 0
    with tempfile.TemporaryDirectory(prefix=".tgi-conversion-", dir=folder) as scratch:
        for number, name in enumerate(names, start=1):
            target = _target_name(number, len(names))
            size = (folder / name).stat().st_size
            report(name, 0, size)
            tensors = _load(folder / name)
            kept, aliases = _without_shared(tensors)
            for key in kept:
                if key in weight_map:
                    raise CheckpointError(f"tensor {key!r} is in {name} and in an earlier file")
                weight_map[key] = target
            save_file(kept, Path(scratch) / target, metadata={"format": "pt", **aliases})
            report(name, size // 2, size)
            _compare(name, tensors, aliases, Path(scratch) / target)
            total_size += sum(tensor.nbytes for tensor in kept.values())
            report(name, size, size)
        if len(names) > 1:
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            (Path(scratch) / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        # The index comes last in this order, and without it a set of parts counts as unfinished.
        written = sorted(Path(scratch).iterdir(), key=lambda path: path.suffix == ".json")
        for path in written:
            path.replace(folder / path.name)
    return [path.name for path in written]


def _target_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _load(path: Path) -> dict[str, Tensor]:
    try:
        state = _unpickle(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path.name} cannot be read as plain tensors: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path.name} holds no tensors by name")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path.name}: {key!r} is a {type(value).__name__}, no tensor")
    return state


def _unpickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError) as error:
        if "mmap" not in str(error):
            raise
        # Files from before PyTorch 1.6 are not zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)


def _without_shared(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return contiguous tensors without repeats, and for each name left out the name it equals."""
    first: dict[tuple[Any, ...], str] = {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first:
            aliases[name] = first[view]
            continue
        first[view] = name
        # Different views of one storage are different tensors, but must not stay entangled.
        kept[name] = tensor.clone() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return kept, aliases


def _compare(name: str, tensors: dict[str, Tensor], aliases: dict[str, str], path: Path) -> None:
    """Read every tensor back, also those stored under another name, and compare bit by bit."""
    with safe_open(path, framework="pt") as stored:
        for key, tensor in tensors.items():
            copy = stored.get_tensor(aliases.get(key, key))
            same = copy.dtype == tensor.dtype and copy.shape == tensor.shape
            if not same or not torch.equal(_bits(copy), _bits(tensor)):
                raise CheckpointError(f"{name}: tensor {key!r} differs after conversion")


def _bits(tensor: Tensor) -> Tensor:
    # Compared as bytes, a NaN equals itself.
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _print_progress(name: str, done: int, total: int) -> None:
    print(json.dumps({"name": name, "done": done, "total": total}), flush=True)


def main(arguments: Sequence[str]) -> int:
    """Convert `arguments[1:]` in folder `arguments[0]`; return the exit code."""
    folder = Path(arguments[0])
    outcome: dict[str, Any]
    try:
        outcome = {"files": convert(folder, arguments[1:], _print_progress)}
    except CheckpointError as error:
        outcome = {"error": error.message}
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
        sentence = f"cannot write safetensors to {str(folder)!r}: {error}"
        outcome = {"error": sentence, "disk_full": full}
    print(json.dumps(outcome), flush=True)
    return 0 if "files" in outcome else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
