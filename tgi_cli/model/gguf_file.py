"""One GGUF file: its metadata and where each tensor lies, checked against the file's size.

The layout is that of the GGUF specification (ggml's `docs/gguf.md`), versions 2 and 3, little
endian. Knows no architecture: names are the file's own and blocks stay as they are stored.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.quantize.formats.gguf_blocks import BLOCK_TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
DOWNLOAD_AGAIN = "the file is incomplete or damaged; fetch it again"

TYPES_BY_CODE = {kind.code: kind for kind in BLOCK_TYPES.values()}

# Metadata value types of fixed size, by their number in the file.
SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
STRING, ARRAY = 8, 9
U32, U64 = SCALARS[4], SCALARS[10]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `shape` in torch's order, `offset` and `nbytes` in the file."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """A GGUF file, mapped. `metadata` by key, `tensors` by GGUF name.

    Raises:
        CheckpointError: no such file, no GGUF file, truncated or inconsistent.
        UnsupportedModel: another version or byte order, or a tensor type that is not decoded here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._data = _map(self.path)
        header = _Cursor(self.path, self._data)
        tensor_count, metadata_count = _counts(header)
        self.metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = header.string()
            self.metadata[key] = header.value(header.number(U32))
        entries = [_entry(header) for _ in range(tensor_count)]
        self.tensors = self._place(entries, header.position)

    def _place(
        self, entries: list[tuple[str, tuple[int, ...], BlockType, int]], header_end: int
    ) -> dict[str, TensorEntry]:
        """Give every tensor its place in the file, and check that the file reaches that far."""
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise CheckpointError(f"`{self.path}` has the impossible alignment {alignment!r}")
        start = -(-header_end // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise CheckpointError(f"`{self.path}` has two tensors named `{name}`")
            if offset % alignment:
                raise CheckpointError(
                    f"tensor `{name}` of `{self.path}` begins at {offset}, which is not aligned to "
                    f"{alignment} bytes",
                    hint=DOWNLOAD_AGAIN,
                )
            if shape[-1] % kind.block_size:
                raise CheckpointError(
                    f"tensor `{name}` of `{self.path}` has {shape[-1]} columns, which are not "
                    f"whole {kind.name} blocks of {kind.block_size}",
                    hint=DOWNLOAD_AGAIN,
                )
            nbytes = prod(shape[:-1]) * kind.row_bytes(shape[-1])
            end = start + offset + nbytes
            if end > len(self._data):
                raise CheckpointError(
                    f"`{self.path}` is truncated: tensor `{name}` ends at byte {end:,}, but the "
                    f"file has {len(self._data):,} bytes",
                    hint=DOWNLOAD_AGAIN,
                )
            tensors[name] = TensorEntry(name, kind, shape, start + offset, nbytes)
        return tensors

    def stored(self, name: str) -> Tensor:
        """View one tensor's bytes: uint8 [rows, row_bytes], a vector being one row.

        The view is of the mapped file; nothing is read before it is touched.
        """
        entry = self.tensors[name]
        if not entry.nbytes:
            return torch.empty(0, 0, dtype=torch.uint8)
        flat = torch.frombuffer(
            self._data, dtype=torch.uint8, count=entry.nbytes, offset=entry.offset
        )
        return flat.view(-1, entry.kind.row_bytes(entry.shape[-1]))


class _Cursor:
    """A position in the header; every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.position = 0
        self._data = data

    def number(self, layout: struct.Struct) -> Any:
        """Read one scalar."""
        (value,) = layout.unpack(self._take(layout.size))
        return value

    def string(self) -> str:
        """Read one length-prefixed UTF-8 string."""
        return self._take(self.number(U64)).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """Read one metadata value."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise CheckpointError(
                f"`{self.path}` has a metadata value of the unknown type {kind}",
                hint=DOWNLOAD_AGAIN,
            )
        element, count = self.number(U32), self.number(U64)
        if element in SCALARS:
            layout = SCALARS[element]
            return [value for (value,) in layout.iter_unpack(self._take(count * layout.size))]
        return [self.value(element) for _ in range(count)]

    def _take(self, size: int) -> bytes:
        start, end = self.position, self.position + size
        if end > len(self._data):
            raise CheckpointError(
                f"`{self.path}` is truncated: its header needs byte {end:,}, but the file has "
                f"{len(self._data):,} bytes",
                hint=DOWNLOAD_AGAIN,
            )
        self.position = end
        return self._data[start:end]


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(
                    f"`{path}` is no GGUF file: it does not begin with `GGUF`", hint=DOWNLOAD_AGAIN
                )
            # Copy on write, because torch wants writable buffers; nobody writes.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error.strerror}") from error


def _counts(header: _Cursor) -> tuple[int, int]:
    """Read the fixed part: number of tensors and number of metadata values."""
    header.position = len(MAGIC)
    version = header.number(U32)
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        what = "big-endian" if swapped else f"version {version}"
        raise UnsupportedModel(
            f"`{header.path}` is a {what} GGUF file; little-endian versions 2 and 3 are read",
            hint="convert the model again with a current llama.cpp",
        )
    return header.number(U64), header.number(U64)


def _entry(header: _Cursor) -> tuple[str, tuple[int, ...], BlockType, int]:
    """Read one row of the tensor table: name, shape, type and offset behind the header."""
    name = header.string()
    dimensions = header.number(U32)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise CheckpointError(
            f"tensor `{name}` of `{header.path}` has {dimensions} dimensions", hint=DOWNLOAD_AGAIN
        )
    # ggml lists the fastest-moving dimension first.
    shape = tuple(reversed([header.number(U64) for _ in range(dimensions)]))
    code, offset = header.number(U32), header.number(U64)
    if code not in TYPES_BY_CODE:
        raise UnsupportedModel(
            f"tensor `{name}` of `{header.path}` is stored as {_type_name(code)}, which this build "
            f"does not read; it reads {', '.join(BLOCK_TYPES)}",
            hint="use another quantization of the model, for example Q4_K_M or Q8_0",
        )
    return name, shape, TYPES_BY_CODE[code], offset


def _type_name(code: int) -> str:
    from gguf.constants import GGMLQuantizationType  # only to name what is not supported

    try:
        return str(GGMLQuantizationType(code).name)
    except ValueError:
        return f"type {code}"
