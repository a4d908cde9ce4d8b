"""Matrices of GGUF files: decoded to dense ones when loaded, or kept as stored for native kernels.

`GgufFormat.load` is the only place that decides so. Block layouts are `gguf_blocks`' business;
finding a tensor in a file that of the source, packing for a kernel that of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tgi_cli.errors import CheckpointError
from tgi_cli.kernels.grouped import Grouped, GroupScheme
from tgi_cli.quantize.formats.base import WHOLE, Shard, TensorSource, Weight
from tgi_cli.quantize.formats.dense import DenseFormat, DenseWeight
from tgi_cli.quantize.formats.gguf_blocks import BlockType, dequantize, regroup

#: Inputs that native kernels take at once; groups of every scheme divide it.
_RUN = 32


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


class BlockWeight:
    """Matrices of one scheme, stacked along the output and kept as stored.

    Made for a backend that packs it (`kernels.grouped.GroupedRows`). Until then it multiplies by
    decoding itself each time, which is right and slow.
    """

    def __init__(self, parts: Sequence[PackedTensor], scheme: GroupScheme) -> None:
        self.parts = tuple(parts)
        self.scheme = scheme
        self.in_features = parts[0].shape[1]
        self.out_features = sum(part.shape[0] for part in parts)
        self.nbytes = sum(part.data.nbytes for part in parts)

    def matmul(self, x: Tensor, ops: Any) -> Tensor:
        """Decode, then multiply [tokens, in_features] to [tokens, out_features] in x's dtype."""
        product: Tensor = ops.linear(x, self.dequantize().to(x.dtype))
        return product

    def prepare(self, ops: Any, out: Tensor | None = None) -> Weight:
        """Return self, or the dense matrix if there is a place for it."""
        return self if out is None else DenseWeight(out.copy_(self.dequantize()))

    def dequantize(self) -> Tensor:
        """Return the dense matrix in float32, exact."""
        return torch.cat([part.unpack() for part in self.parts])

    def rows(self, start: int, end: int) -> Grouped:
        """Codes and scales of rows `start` up to `end`."""
        found = []
        for part in self.parts:
            size = part.shape[0]
            if start < size and end > 0:
                found.append(part.regroup(max(start, 0), min(end, size)))
            start, end = start - size, end - size
        if len(found) == 1:
            return found[0]
        minima = [rows.minima for rows in found if rows.minima is not None]
        return Grouped(
            torch.cat([rows.codes for rows in found]),
            torch.cat([rows.scales for rows in found]),
            torch.cat(minima) if minima else None,
        )

    def gather(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode some rows: [n] int64 -> [n, in_features]."""
        (part,) = self.parts
        return dequantize(part.data[indices], part.kind, dtype, part.columns)


class GgufFormat:
    """All matrices of a GGUF file, whatever mixture of block types they use.

    `keep_blocks` leaves those as stored that a native kernel can multiply (`BlockWeight`).
    """

    name = "gguf"

    def __init__(self, *, keep_blocks: bool = False) -> None:
        self.keep_blocks = keep_blocks

    def covers(self, key: str) -> bool:
        """Every tensor of a GGUF file is stored as one of its types."""
        return True

    def load(self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype) -> Weight:
        """Read one matrix, or a shard of it: as blocks if they are kept, else dense in `dtype`.

        Raises:
            CheckpointError: the source is no GGUF file, or the tensor is missing or no matrix.
        """
        if not isinstance(source, PackedSource):
            raise CheckpointError(f"`{key}` is to be read as GGUF blocks but is not in a GGUF file")
        packed = source.packed(key)
        if len(packed.shape) != 2:
            raise CheckpointError(
                f"tensor `{key}` has shape {packed.shape}, but a matrix is needed here",
                hint="the file is damaged or was made by an incompatible converter",
            )
        scheme = self._scheme(packed.kind)
        if scheme is not None:
            return BlockWeight([packed.shard(shard)], scheme)
        return DenseWeight(packed.unpack(dtype, shard))

    def column_unit(self, source: TensorSource, key: str) -> int:
        """Blocks that are kept are cut between runs of inputs, others anywhere."""
        assert isinstance(source, PackedSource)
        return 1 if self._scheme(source.block_type(key)) is None else _RUN

    def fuse(self, parts: Sequence[Weight]) -> Weight:
        """Stack matrices of equal `in_features`; those of different schemes become dense."""
        blocks = [part for part in parts if isinstance(part, BlockWeight)]
        if len(blocks) == len(parts) and len({part.scheme for part in blocks}) == 1:
            return BlockWeight([each for part in blocks for each in part.parts], blocks[0].scheme)
        # Blocks are kept for activations of bfloat16 alone.
        return DenseFormat().fuse(
            [
                DenseWeight(part.dequantize().bfloat16()) if isinstance(part, BlockWeight) else part
                for part in parts
            ]
        )

    def common_scheme(self, source: TensorSource, keys: Sequence[str]) -> GroupScheme | None:
        """What `fuse` will keep these matrices in; None if they become dense."""
        assert isinstance(source, PackedSource)
        schemes = {self._scheme(source.block_type(key)) for key in keys}
        return schemes.pop() if len(schemes) == 1 else None

    def _scheme(self, kind: BlockType) -> GroupScheme | None:
        return kind.scheme if self.keep_blocks else None
