"""Matrices of GGUF files.

They are decoded to dense ones when loaded: `GgufFormat.load` is the only place that decides so.
Block layouts are `gguf_blocks`' business; finding a tensor in a file that of the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tgi_cli.errors import CheckpointError
from tgi_cli.quantize.formats.base import WHOLE, Shard, TensorSource, Weight
from tgi_cli.quantize.formats.dense import DenseFormat, DenseWeight
from tgi_cli.quantize.formats.gguf_blocks import BlockType, dequantize


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor as a GGUF file stores it: `data` is uint8 [rows, row_bytes], usually a file view.

    `shape` is the logical one; a vector is one row.
    """

    kind: BlockType
    shape: tuple[int, ...]
    data: Tensor

    def unpack(self, dtype: torch.dtype = torch.float32, shard: Shard = WHOLE) -> Tensor:
        """Decode it, or a shard of it, into a new tensor of `dtype`."""
        data, columns = self.data, None
        shape = list(self.shape)
        if shard.dim is not None and shard.world_size > 1:
            start, end = shard.bounds(shape[shard.dim])
            shape[shard.dim] = end - start
            if shard.dim == len(shape) - 1:
                columns = (start, end)
            else:
                inner = data.shape[0] // self.shape[0]  # stored rows per index of the first axis
                if shard.dim != 0:
                    raise ValueError("only the first and the last axis can be sharded")
                data = data[start * inner : end * inner]
        return dequantize(data, self.kind, dtype, columns).view(shape)


@runtime_checkable
class PackedSource(Protocol):
    """A `TensorSource` that can also give its tensors' stored blocks, under the same names."""

    def keys(self) -> Iterator[str]:
        """Names of all tensors."""
        ...

    def packed(self, key: str) -> PackedTensor:
        """The stored form of one tensor."""
        ...


class GgufFormat:
    """All matrices of a GGUF file, whatever mixture of block types they use."""

    name = "gguf"

    def covers(self, key: str) -> bool:
        """Every tensor of a GGUF file is stored as one of its types."""
        return True

    def load(self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype) -> DenseWeight:
        """Decode one matrix, or a shard of it, to a dense one in `dtype`.

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
        return DenseWeight(packed.unpack(dtype, shard))

    def fuse(self, parts: Sequence[Weight]) -> DenseWeight:
        """Stack matrices of equal `in_features` along the output."""
        return DenseFormat().fuse(parts)
