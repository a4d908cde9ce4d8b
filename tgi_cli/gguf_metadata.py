"""The header of a GGUF file: its key/value pairs and its tensor directory, without any weights.

Scalars are decoded at once, arrays only when asked for, straight from the mapped file: the
vocabulary of a 262 k-token model costs a tenth of a second where a reader that makes an object of
each element needs several. Layout: the GGUF specification, versions 2 and 3. Knows nothing of what
the keys mean or how tensor bytes are encoded; needs no torch.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tgi_cli.errors import CheckpointError, UnsupportedModel

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_ARRAY: Final = 9
_DEFAULT_ALIGNMENT: Final = 32
#: struct format by value type; 8 is a string, 9 an array.
_SCALARS: Final = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_SMALLEST_PAIR: Final = 13  # bytes: key length, type and one byte of value
_SMALLEST_TENSOR: Final = 24  # bytes: name length, dimension count, type and offset
_MAX_DIMENSIONS: Final = 4


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in the file.

    Attributes:
        name: The name llama.cpp gave it.
        shape: Slowest dimension first, as numpy and torch count (GGUF stores it reversed).
        ggml_type: The number of its encoding (`gguf.GGMLQuantizationType`).
        offset: First byte, from the start of the file.
        num_bytes: How many bytes it takes.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _ArrayAt:
    """Where an array's elements lie, and what they are."""

    offset: int
    count: int
    type: int


class GGUFMetadata:
    """Key/value pairs and tensor directory of one `.gguf` file.

    Example:
        >>> metadata = read_gguf_metadata("model.gguf")  # doctest: +SKIP
        >>> metadata["general.architecture"]  # doctest: +SKIP
        'llama'
        >>> len(metadata["tokenizer.ggml.tokens"])  # doctest: +SKIP
        49152

    Attributes:
        path: The file, as given.
        tensors: One entry per tensor, in file order.
    """

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path = path
        self._data = data
        self._values: dict[str, Any] = {}
        self.tensors: tuple[TensorEntry, ...] = ()
        cursor = _Cursor(path, data)
        num_tensors, num_pairs = self._read_start(cursor)
        self._read_pairs(cursor, num_pairs)
        self.tensors = self._read_tensors(cursor, num_tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __getitem__(self, key: str) -> Any:
        """Value of `key`: a scalar, a string, a list of strings or of Python scalars.

        Raises:
            CheckpointError: The file does not hold the key.
        """
        try:
            value = self._values[key]
        except KeyError:
            raise CheckpointError(
                f"the GGUF file `{self.path}` lacks the key `{key}`",
                hint="convert the model again with a current version of its converter",
            ) from None
        return self._decode(value) if isinstance(value, _ArrayAt) else value

    def get(self, key: str, default: Any = None) -> Any:
        """Value of `key`, or `default` where the file does not hold it."""
        return self[key] if key in self._values else default

    def array(self, key: str) -> np.ndarray[Any, np.dtype[Any]]:
        """A copy of the numeric array under `key`, with the file's own dtype.

        Raises:
            CheckpointError: The key is missing or no numeric array.
        """
        value = self._values.get(key)
        if not isinstance(value, _ArrayAt) or value.type == _STRING:
            raise CheckpointError(f"`{key}` in the GGUF file `{self.path}` is no numeric array")
        dtype = np.dtype(np.bool_ if value.type == 7 else _SCALARS[value.type])
        return np.frombuffer(self._data, dtype, value.count, value.offset).copy()

    def _decode(self, at: _ArrayAt) -> list[Any]:
        if at.type != _STRING:
            dtype = np.dtype(np.bool_ if at.type == 7 else _SCALARS[at.type])
            values: list[Any] = np.frombuffer(self._data, dtype, at.count, at.offset).tolist()
            return values
        strings = []
        offset, data, length_at = at.offset, self._data, struct.Struct("<Q").unpack_from
        for _ in range(at.count):
            start = offset + 8
            offset = start + length_at(data, offset)[0]
            # Some converters cut a vocabulary entry inside a character.
            strings.append(data[start:offset].decode("utf-8", "replace"))
        return strings

    def _read_start(self, cursor: _Cursor) -> tuple[int, int]:
        if cursor.take(4) != _MAGIC:
            raise CheckpointError(
                f"`{self.path}` is not a GGUF file: it does not start with `GGUF`",
                hint="download it again; an interrupted or redirected download looks like this",
            )
        version = cursor.scalar("<I")
        if version & 0xFFFF == 0:
            raise UnsupportedModel(f"`{self.path}` is a big-endian GGUF file")
        if version not in _VERSIONS:
            raise UnsupportedModel(
                f"`{self.path}` has GGUF version {version}, supported are 2 and 3",
                hint="convert the model again with a current version of its converter",
            )
        num_tensors, num_pairs = cursor.scalar("<Q"), cursor.scalar("<Q")
        smallest = num_tensors * _SMALLEST_TENSOR + num_pairs * _SMALLEST_PAIR
        if smallest > len(self._data):
            raise CheckpointError(
                f"`{self.path}` is corrupt: {num_tensors} tensors and {num_pairs} keys do not fit "
                f"into its {len(self._data)} bytes"
            )
        return num_tensors, num_pairs

    def _read_pairs(self, cursor: _Cursor, count: int) -> None:
        for _ in range(count):
            key = cursor.string()
            if key in self._values:
                raise CheckpointError(f"`{self.path}` is corrupt: the key `{key}` occurs twice")
            self._values[key] = cursor.value(key)

    def _read_tensors(self, cursor: _Cursor, count: int) -> tuple[TensorEntry, ...]:
        found = [cursor.tensor() for _ in range(count)]
        alignment = self._values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"`{self.path}` is corrupt: its alignment is {alignment!r}")
        base = -(-cursor.offset // alignment) * alignment
        size = len(self._data)
        tensors = []
        for name, shape, ggml_type, offset in found:
            num_bytes = self._num_bytes(name, shape, ggml_type)
            if base + offset + num_bytes > size:
                raise CheckpointError(
                    f"`{self.path}` is truncated: tensor `{name}` ends at byte "
                    f"{base + offset + num_bytes} and the file has {size}",
                    hint="download it again",
                )
            tensors.append(TensorEntry(name, shape, ggml_type, base + offset, num_bytes))
        return tuple(tensors)

    def _num_bytes(self, name: str, shape: tuple[int, ...], ggml_type: int) -> int:
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
        except (ValueError, KeyError):
            raise UnsupportedModel(
                f"tensor `{name}` in `{self.path}` has the unknown GGML type {ggml_type}"
            ) from None
        count = 1
        for length in shape:
            count *= length
        if shape and shape[-1] % block:
            raise CheckpointError(
                f"`{self.path}` is corrupt: rows of tensor `{name}` have {shape[-1]} elements, "
                f"no multiple of the block of {block}"
            )
        return count // block * block_bytes


class _Cursor:
    """Reads forward through the header and never past the end of the file."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self.offset = 0

    def take(self, count: int) -> bytes:
        end = self.offset + count
        if end > len(self._data):
            raise CheckpointError(
                f"`{self._path}` is truncated: its header goes on past byte {len(self._data)}",
                hint="download it again",
            )
        piece = self._data[self.offset : end]
        self.offset = end
        return piece

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        raw = self.take(self.scalar("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"`{self._path}` is corrupt: text before byte {self.offset} is not UTF-8"
            ) from error

    def value(self, key: str) -> Any:
        kind = self.scalar("<I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(key)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        raise CheckpointError(f"`{self._path}` is corrupt: `{key}` has the unknown type {kind}")

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        num_dimensions = self.scalar("<I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise CheckpointError(
                f"`{self._path}` is corrupt: tensor `{name}` has {num_dimensions} dimensions, "
                f"the limit is {_MAX_DIMENSIONS}"
            )
        shape = tuple(self.scalar("<Q") for _ in range(num_dimensions))[::-1]
        return name, shape, self.scalar("<I"), self.scalar("<Q")

    def _array(self, key: str) -> _ArrayAt:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        start = self.offset
        if kind in _SCALARS:
            self.take(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            self._skip_strings(count)
        else:
            raise CheckpointError(
                f"`{self._path}` is corrupt: the array `{key}` has the unknown element type {kind}"
            )
        return _ArrayAt(start, count, kind)

    def _skip_strings(self, count: int) -> None:
        offset, data, size = self.offset, self._data, len(self._data)
        length_at = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                offset += 8 + length_at(data, offset)[0]
                if offset > size:
                    break
        except struct.error:
            offset = size + 1
        self.take(offset - self.offset)


def read_gguf_metadata(path: str) -> GGUFMetadata:
    """Read the header of a GGUF file and check that every tensor lies within the file.

    Args:
        path: A `.gguf` file.

    Raises:
        CheckpointError: The file is missing, no GGUF file, truncated or corrupt.
        UnsupportedModel: The version, byte order or a tensor type is not supported.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"`{path}` is empty", hint="download it again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror or error}") from error
    return GGUFMetadata(path, data)
