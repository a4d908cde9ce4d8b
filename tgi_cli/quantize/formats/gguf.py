"""Matrices of GGUF files: decoded to dense ones when loaded, or kept as stored for native kernels.

`GgufFormat.load` is the only place that decides so. Block layouts are `gguf_blocks`' business;
finding a tensor in a file that of the source, packing for a kernel that of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tgi_cli.errors import CheckpointError
from tgi_cli.kernels.grouped import Grouped, GroupScheme
from tgi_cli.quantize.formats.base import WHOLE, Shard, TensorSource, Weight
from tgi_cli.quantize.formats.dense import DenseWeight
from tgi_cli.quantize.formats.gguf_blocks import BlockType, dequantize, regroup
from tgi_cli.quantize.formats.packed import RUN, GroupedTable, GroupedWeight, stack


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor as a GGUF file stores it: `data` is uint8 [rows, row_bytes], usually a file view.

    `shape` is the logical one; a vector is one row. `columns`, if set, are those of the stored
    elements of each row that belong to it.
    """

    kind: BlockType
    shape: tuple[int, ...]
    data: Tensor
    columns: tuple[int, int] | None = None

    def shard(self, shard: Shard) -> PackedTensor:
        """A part of it, as it is stored: the rows, or the blocks that hold its columns."""
        if shard.dim is None or shard.world_size == 1:
            return self
        start, end = shard.bounds(self.shape[shard.dim])
        shape = (*self.shape[: shard.dim], end - start, *self.shape[shard.dim + 1 :])
        if shard.dim == len(shape) - 1 and len(shape) > 1:
            size = self.kind.block_size
            first, last = start // size, -(-end // size)
            stored = self.data[:, first * self.kind.type_size : last * self.kind.type_size]
            return PackedTensor(
                self.kind, shape, stored, (start - first * size, end - first * size)
            )
        if len(shape) == 1:
            return PackedTensor(self.kind, shape, self.data, (start, end))
        if shard.dim != 0:
            raise ValueError("only the first and the last axis can be sharded")
        inner = self.data.shape[0] // self.shape[0]  # stored rows per index of the first axis
        return PackedTensor(self.kind, shape, self.data[start * inner : end * inner], self.columns)

    def unpack(self, dtype: torch.dtype = torch.float32, shard: Shard = WHOLE) -> Tensor:
        """Decode it, or a shard of it, into a new tensor of `dtype`."""
        part = self.shard(shard)
        return dequantize(part.data, part.kind, dtype, part.columns).view(part.shape)

    def regroup(self, start: int, end: int) -> Grouped:
        """Codes and scales of rows `start` up to `end`; the columns are whole groups."""
        grouped = regroup(self.data[start:end], self.kind)
        if self.columns is None:
            return grouped
        assert self.kind.scheme is not None
        first, last = self.columns
        size = self.kind.scheme.group
        groups = slice(first // size, last // size)
        return Grouped(
            grouped.codes[:, first:last],
            grouped.scales[:, groups],
            None if grouped.minima is None else grouped.minima[:, groups],
        )


@runtime_checkable
class PackedSource(Protocol):
    """A `TensorSource` that can also give its tensors' stored blocks, under the same names."""

    def keys(self) -> Iterator[str]:
        """Names of all tensors."""
        ...

    def packed(self, key: str) -> PackedTensor:
        """The stored form of one tensor."""
        ...

    def block_type(self, key: str) -> BlockType:
        """The type of one tensor, without reading it."""
        ...


class BlockMatrix:
    """A matrix of blocks as stored (`packed.StoredMatrix`)."""

    group = 1
    order: Tensor | None = None

    def __init__(self, packed: PackedTensor) -> None:
        self.packed = packed
        self.out_features, self.in_features = packed.shape
        self.nbytes = packed.data.nbytes
        self.scheme = packed.kind.scheme

    def decode(self, start: int, end: int) -> Tensor:
        """Rows in float32, exact."""
        packed = self.packed
        return dequantize(packed.data[start:end], packed.kind, columns=packed.columns)

    def rows(self, start: int, end: int) -> Grouped:
        """Codes and scales of rows."""
        return self.packed.regroup(start, end)

    def gather(self, indices: Tensor) -> Tensor:
        """Decode some rows: [n] int64 -> [n, in_features] float32."""
        packed = self.packed
        return dequantize(packed.data[indices], packed.kind, columns=packed.columns)


class GgufFormat:
    """All matrices of a GGUF file, whatever mixture of block types they use."""

    name = "gguf"

    def __init__(self, *, packs: bool = False, wide_activations: bool = False) -> None:
        self.packs = packs
        self.wide_activations = wide_activations

    def packing(self, *, wide_activations: bool = False) -> GgufFormat:
        """See `Format.packing`."""
        return GgufFormat(packs=True, wide_activations=wide_activations)

    def names(self, source: TensorSource) -> list[str]:
        """The source has translated them."""
        return list(source.keys())

    def covers(self, source: TensorSource, key: str) -> bool:
        """Every tensor of a GGUF file is stored as one of its types."""
        return True

    def tensors(self, source: TensorSource, key: str) -> tuple[str, ...]:
        """A matrix is one tensor."""
        return (key,)

    def shape(self, source: TensorSource, key: str) -> tuple[int, ...]:
        """Logical shape."""
        return source.shape(key)

    def scheme(
        self, source: TensorSource, keys: Sequence[str], shard: Shard = WHOLE
    ) -> GroupScheme | None:
        """What `fuse` will keep these matrices in; None if they become dense."""
        if not self.packs or not isinstance(source, PackedSource):
            return None
        schemes = {source.block_type(key).scheme for key in keys}
        return schemes.pop() if len(schemes) == 1 else None

    def load(self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype) -> Weight:
        """Read one matrix, or a shard of it: as blocks if they are kept, else dense in `dtype`.

        Raises:
            CheckpointError: the source is no GGUF file, or the tensor is missing or no matrix.
        """
        packed = _matrix(source, key)
        if self.packs and packed.kind.scheme is not None:
            matrix = BlockMatrix(packed.shard(shard))
            return GroupedWeight([matrix], dtype, wide_activations=self.wide_activations)
        return DenseWeight(packed.unpack(dtype, shard))

    def table(
        self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype
    ) -> GroupedTable | None:
        """A table that stays in blocks, if blocks are kept."""
        if self.scheme(source, [key]) is None:
            return None
        matrix = BlockMatrix(_matrix(source, key).shard(shard))
        return GroupedTable(matrix, matrix, dtype, wide_activations=self.wide_activations)

    def column_unit(self, source: TensorSource, key: str) -> int:
        """Blocks that are kept are cut between runs of inputs, others anywhere."""
        return 1 if self.scheme(source, [key]) is None else RUN

    def fuse(self, parts: Sequence[Weight]) -> Weight:
        """Stack matrices of equal `in_features`; those of different schemes become dense."""
        return stack(parts)


def _matrix(source: TensorSource, key: str) -> PackedTensor:
    if not isinstance(source, PackedSource):
        raise CheckpointError(f"`{key}` is to be read as GGUF blocks but is not in a GGUF file")
    packed = source.packed(key)
    if len(packed.shape) != 2:
        raise CheckpointError(
            f"tensor `{key}` has shape {packed.shape}, but a matrix is needed here",
            hint="the file is damaged or was made by an incompatible converter",
        )
    return packed
