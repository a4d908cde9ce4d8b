"""The seam between checkpoints and layers: tensor sources, and how a format loads and multiplies.

A `Format` knows packing and groups; layers know none of it. Adding a format is one file and one
line in `detect`. Names are Hugging Face tensor names everywhere; a GGUF source translates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tgi_cli.kernels.grouped import GroupScheme


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a matrix in logical rows and columns, as one rank of `world_size` holds it.

    `dim` is 0 for output rows, 1 for input columns, None for the whole matrix. Parts are equal, or
    with `unit` whole multiples of it (but for the end) that differ by one unit at most.
    """

    dim: int | None = None
    rank: int = 0
    world_size: int = 1
    unit: int | None = None

    def bounds(self, size: int) -> tuple[int, int]:
        """Return first and last-plus-one index along `dim` of a matrix with `size` there."""
        if self.unit is not None:
            count = -(-size // self.unit)
            first, last = (n * count // self.world_size for n in (self.rank, self.rank + 1))
            return min(size, first * self.unit), min(size, last * self.unit)
        if size % self.world_size:
            raise ValueError(f"{size} does not divide into {self.world_size} shards")
        part = size // self.world_size
        return self.rank * part, (self.rank + 1) * part


WHOLE = Shard()


class TensorSource(Protocol):
    """A checkpoint's tensors by name, read lazily. Missing or bad data is a `CheckpointError`."""

    def keys(self) -> Iterator[str]:
        """Names of all tensors."""
        ...

    def __contains__(self, key: str) -> bool: ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Logical shape, without reading the data."""
        ...

    def nbytes(self, key: str) -> int:
        """Bytes on disk."""
        ...

    def read(self, key: str, shard: Shard = WHOLE) -> Tensor:
        """The tensor (or this shard of it), as stored if dense, else dequantized to float32."""
        ...

    def release(self, key: str) -> None:
        """Take what was read of the tensor out of memory, where it is a view of a mapped file.

        Such views stay valid: what is touched again is read again.
        """
        ...


class Weight(Protocol):
    """How one matrix multiplies. `out_features` x `in_features`, logical."""

    in_features: int
    out_features: int
    nbytes: int

    def matmul(self, x: Tensor, ops: Any) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features], in x's dtype."""
        ...

    def prepare(self, ops: Any, out: Tensor | None = None) -> Weight:
        """Repack once for a backend, into `out` if given; may return self."""
        ...

    def dequantize(self) -> Tensor:
        """The dense [out_features, in_features] matrix this weight stands for: the oracle."""
        ...


class TableWeight(Weight, Protocol):
    """A matrix whose rows can also be looked up: the token table."""

    def gather(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows: [n] int64 -> [n, in_features]."""
        ...


class Format(Protocol):
    """How the matrices of one checkpoint are stored.

    A matrix is known by the name it has in the dense model (`….weight`), whatever tensors it is
    stored in. `packs` says whether matrices stay as stored where a kernel multiplies them so; else
    they are decoded when they are loaded. With `wide_activations` packed integers are multiplied
    by 16-bit activations instead of int8 ones.
    """

    name: str
    packs: bool
    wide_activations: bool

    def packing(self, *, wide_activations: bool = False) -> Format:
        """The same format with `packs` on."""
        ...

    def names(self, source: TensorSource) -> list[str]:
        """What the model would call the stored tensors: a packed matrix counts as one."""
        ...

    def covers(self, source: TensorSource, key: str) -> bool:
        """Whether the matrix `key` is stored in this format, and not plainly."""
        ...

    def tensors(self, source: TensorSource, key: str) -> tuple[str, ...]:
        """The stored tensors that make up `key`."""
        ...

    def shape(self, source: TensorSource, key: str) -> tuple[int, ...]:
        """Logical shape of `key`."""
        ...

    def scheme(
        self, source: TensorSource, keys: Sequence[str], shard: Shard = WHOLE
    ) -> GroupScheme | None:
        """What these matrices will be held in once stacked; None if they become dense.

        With `shard`, parts of them; only cuts along the inputs make a difference.
        """
        ...

    def load(self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype) -> Weight:
        """Read one matrix, or a shard of it; `dtype` is that of the activations."""
        ...

    def table(
        self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype
    ) -> TableWeight | None:
        """A token table that stays packed; None, and nothing read, where it is to be dense."""
        ...

    def column_unit(self, source: TensorSource, key: str) -> int:
        """How many inputs of matrix `key` are stored together: shards are cut between them."""
        ...

    def fuse(self, parts: Sequence[Weight]) -> Weight:
        """Stack matrices along the output (q, k, v; gate, up) into one."""
        ...
