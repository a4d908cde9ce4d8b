"""Safetensors checkpoints as a `TensorSource`: headers first, data only when asked for.

One file or shards behind `model.safetensors.index.json`, as `transformers` writes them. The library
checks the files; tensors are views of our own mapping, whose pages can be let go. Knows no model:
which names exist and what they mean is the families' business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tgi_cli.errors import CheckpointError
from tgi_cli.model.mapped_file import MappedFile
from tgi_cli.quantize.formats.base import WHOLE, Shard

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DOWNLOAD_AGAIN = "fetch the checkpoint again: `tgi download MODEL`"
LFS_POINTER = b"version https://git-lfs"

# Bits per element of safetensors' dtype names.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class _File:
    """One file: the library's handle, and where each tensor's bytes lie in our mapping."""

    def __init__(self, path: Path) -> None:
        self.handle = _open(path)
        self._mapped = MappedFile(path)
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        self._places: dict[str, tuple[int, int]] = {}  # first byte, number of bytes
        for key in self.handle.keys():  # noqa: SIM118 - a handle is no dictionary
            start, end = header[key]["data_offsets"]
            self._places[key] = (8 + size + start, end - start)

    def tensor(self, key: str) -> Tensor:
        """A view of the file where torch has the dtype, else what the library makes of it."""
        described = self.handle.get_slice(key)
        dtype, (offset, nbytes) = _DTYPES.get(described.get_dtype()), self._places[key]
        if dtype is None or not nbytes:
            made: Tensor = self.handle.get_tensor(key)
            return made
        return self._mapped.view(offset, nbytes).view(dtype).view(described.get_shape())

    def release(self, key: str) -> None:
        """See `TensorSource.release`."""
        offset, nbytes = self._places[key]
        if nbytes:
            self._mapped.release(offset, nbytes)


class SafetensorsSource:
    """The tensors of a folder's safetensors files, mapped and read lazily.

    Every header is read and checked against its file's size when the source is made; tensor data
    is touched by `read` alone. What `read` gives, also of rows, may be a view of the file.

    Args:
        folder: where they are.
        file: the name of the file where there is but one.

    Raises:
        CheckpointError: no weights, a file of the index is missing, truncated or corrupt, or lacks
            a tensor that the index promises.
    """

    def __init__(self, folder: str | Path, *, file: str = SINGLE_FILE) -> None:
        self.folder = Path(folder)
        self._files: dict[str, _File] = {}  # by tensor name
        index = self.folder / INDEX_FILE
        single = self.folder / file
        if single.is_file():
            opened = _File(single)
            self._files = dict.fromkeys(opened.handle.keys(), opened)
        elif index.is_file():
            self._open_shards(_read_index(index))
        else:
            raise _no_weights(self.folder)

    def _open_shards(self, weight_map: dict[str, str]) -> None:
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"`{missing[0]}` is missing from `{self.folder}` ({len(missing)} of {len(names)} "
                f"files that `{INDEX_FILE}` lists)",
                hint=DOWNLOAD_AGAIN,
            )
        opened = {name: _File(self.folder / name) for name in names}
        stored = {name: set(file.handle.keys()) for name, file in opened.items()}
        for key, name in weight_map.items():
            if key not in stored[name]:
                raise CheckpointError(
                    f"tensor `{key}` is not in `{name}`, where `{INDEX_FILE}` says it is",
                    hint=DOWNLOAD_AGAIN,
                )
            self._files[key] = opened[name]

    def keys(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return tuple(self._file(key).handle.get_slice(key).get_shape())

    def stored_dtype(self, key: str) -> str:
        """Safetensors' name of the dtype (`BF16`, `F8_E4M3`), from the header."""
        name: str = self._file(key).handle.get_slice(key).get_dtype()
        return name

    def nbytes(self, key: str) -> int:
        """Bytes on disk, from the header."""
        elements = 1
        for size in self.shape(key):
            elements *= size
        dtype = self.stored_dtype(key)
        if dtype not in BITS:
            raise CheckpointError(f"tensor `{key}` has the unknown dtype `{dtype}`")
        return elements * BITS[dtype] // 8

    def read(self, key: str, shard: Shard = WHOLE) -> Tensor:
        """Read one tensor, or a shard of it, in the dtype it is stored in."""
        file = self._file(key)
        try:
            whole = file.tensor(key)
        except SafetensorError as error:
            raise CheckpointError(
                f"tensor `{key}` cannot be read from `{self.folder}`: {error}", hint=DOWNLOAD_AGAIN
            ) from error
        if shard.dim is None or shard.world_size == 1:
            return whole
        start, end = shard.bounds(whole.shape[shard.dim])
        return whole.narrow(shard.dim, start, end - start).contiguous()

    def release(self, key: str) -> None:
        """Let the tensor's pages go."""
        self._file(key).release(key)

    def _file(self, key: str) -> _File:
        try:
            return self._files[key]
        except KeyError:
            raise CheckpointError(
                f"tensor `{key}` is missing from the checkpoint in `{self.folder}`",
                hint="the weights and `config.json` do not belong together, or the download is "
                "incomplete",
            ) from None


def _open(path: Path) -> Any:
    """Map one file; the library checks the header and that the tensors fill the file exactly."""
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(
                    f"`{path}` is a Git LFS pointer, not the weights",
                    hint="run `git lfs pull` in the folder, or `tgi download MODEL`",
                )
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"`{path}` is truncated or no safetensors file ({_size(path)}): {error}",
            hint=DOWNLOAD_AGAIN,
        ) from error


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size:,} bytes"
    except OSError:
        return "size unknown"


def _read_index(path: Path) -> dict[str, str]:
    """The map from tensor name to file name, its shape checked."""
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"`{path}` is not readable: {error}", hint=DOWNLOAD_AGAIN) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{path}` has no `weight_map`", hint=DOWNLOAD_AGAIN)
    for name in weight_map.values():
        # Only names of files beside the index: a checkpoint must not point out of its folder.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"`{path}` lists {name!r}, which is no plain file name")
    return weight_map


def _no_weights(folder: Path) -> CheckpointError:
    """What is wrong with a folder that has neither `model.safetensors` nor an index."""
    if not folder.is_dir():
        return CheckpointError(f"`{folder}` is no folder")
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled:
        return CheckpointError(
            f"`{folder}` has weights only as `{pickled[0]}`, a pickle file, which is not loaded",
            hint="`tgi download MODEL` converts such checkpoints to safetensors",
        )
    quantized = sorted(path.name for path in folder.glob("*.gguf"))
    if quantized:
        return CheckpointError(
            f"`{folder}` has no `{SINGLE_FILE}` but GGUF files",
            hint=f"name the file itself: `{folder / quantized[0]}`",
        )
    return CheckpointError(
        f"`{folder}` has no weights: neither `{SINGLE_FILE}` nor `{INDEX_FILE}`",
        hint=DOWNLOAD_AGAIN,
    )
