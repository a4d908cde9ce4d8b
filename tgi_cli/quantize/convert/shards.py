"""Safetensors files written so that a kill leaves a whole file or none, and joined without loading.

Knows names, shapes and bytes; not what they mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tgi_cli.model.weights import BITS, INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 5_000_000_000
_METADATA = {"format": "pt"}
_COPY_BYTES = 1 << 24


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one file; it appears under its name when it is whole and on the disk."""
    partial = path.with_suffix(".partial")
    on_cpu = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(on_cpu, partial, metadata=_METADATA)
    _commit(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file in the same way."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write one text file in the same way."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    _commit(partial, path)


def join(parts: Sequence[Path], folder: Path, *, limit: int = SHARD_BYTES) -> list[Path]:
    """Join safetensors files into as few as `limit` bytes of tensors each allow, and an index.

    Bytes are copied, nothing is decoded. One file is called `model.safetensors` and needs no
    index. Returns the files, without the index.
    """
    groups: list[list[_Part]] = []
    size = 0
    for path in parts:
        part = _read_header(path)
        if not groups or size + part.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.nbytes
    if len(groups) == 1:
        whole = folder / SINGLE_FILE
        _write_joined(groups[0], whole)
        return [whole]
    written, weight_map = [], {}
    for number, group in enumerate(groups, 1):
        path = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_joined(group, path)
        written.append(path)
        weight_map.update({name: path.name for part in group for name in part.tensors})
    total = sum(part.nbytes for group in groups for part in group)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, index)
    return written


@dataclass(frozen=True, slots=True)
class _Part:
    path: Path
    tensors: dict[str, dict[str, Any]]  # dtype, shape, data_offsets
    data_start: int
    nbytes: int


def _read_header(path: Path) -> _Part:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    nbytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    return _Part(path, header, 8 + length, nbytes)


def _write_joined(parts: Sequence[_Part], path: Path) -> None:
    # Widest elements first, as the library writes them: then every tensor is aligned to its own.
    tensors = sorted(
        ((name, entry, part) for part in parts for name, entry in part.tensors.items()),
        key=lambda each: -BITS[each[1]["dtype"]],
    )
    header: dict[str, Any] = {"__metadata__": _METADATA}
    end = 0
    for name, entry, _ in tensors:
        begin, end = end, end + entry["data_offsets"][1] - entry["data_offsets"][0]
        header[name] = {**entry, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to eight bytes
    partial = path.with_suffix(".partial")
    with partial.open("wb") as out, contextlib.ExitStack() as opened:
        files = {part.path: opened.enter_context(part.path.open("rb")) for part in parts}
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, entry, part in tensors:
            begin, end = entry["data_offsets"]
            files[part.path].seek(part.data_start + begin)
            left = end - begin
            while left:
                left -= out.write(files[part.path].read(min(left, _COPY_BYTES)))
    _commit(partial, path)


def _commit(partial: Path, path: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
