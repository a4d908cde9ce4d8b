"""Plain matrices: float32, bfloat16 or float16, one number per element.

The format every other one is compared with. Knows no file layout (a `TensorSource` does) and no
bias (the linear layer adds it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tgi_cli.errors import CheckpointError, UnsupportedModel
from tgi_cli.quantize.formats.base import WHOLE, Shard, TensorSource, Weight

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class DenseWeight:
    """A matrix as it is: `weight` is [out_features, in_features], contiguous."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.numel() * weight.element_size()

    def matmul(self, x: Tensor, ops: Any) -> Tensor:
        """Multiply [tokens, in_features] to [tokens, out_features] in x's dtype."""
        product: Tensor = ops.linear(x, self.weight)
        return product

    def prepare(self, ops: Any, out: Tensor | None = None) -> DenseWeight:
        """Return self, or a copy living in `out` (same shape; its dtype and device win)."""
        if out is None:
            return self
        return DenseWeight(out.copy_(self.weight))

    def dequantize(self) -> Tensor:
        """Return the matrix itself."""
        return self.weight

    def float_rows(self, start: int, end: int) -> Tensor:
        """Rows `start` up to `end`."""
        return self.weight[start:end]


class StoredDense:
    """Dense matrices stacked along the output and left where they are stored.

    Made for a backend that packs it (`kernels.grouped.FloatRows`). Until then it multiplies by
    reading itself each time. `dtype` is that of the activations.
    """

    def __init__(self, parts: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.parts = tuple(parts)  # [out_features, in_features] each, in any float dtype
        self.dtype = dtype
        self.in_features = parts[0].shape[1]
        self.out_features = sum(map(len, parts))
        self.nbytes = sum(part.nbytes for part in parts)

    def matmul(self, x: Tensor, ops: Any) -> Tensor:
        """Multiply [tokens, in_features] to [tokens, out_features] in x's dtype."""
        product: Tensor = ops.linear(x, self.dequantize().to(x.dtype))
        return product

    def prepare(self, ops: Any, out: Tensor | None = None) -> Weight:
        """Return self, or a copy living in `out`."""
        return self if out is None else DenseWeight(out.copy_(self.dequantize()))

    def dequantize(self) -> Tensor:
        """Return the whole matrix, in memory of its own."""
        return torch.cat([part.to(self.dtype) for part in self.parts])

    def float_rows(self, start: int, end: int) -> Tensor:
        """Rows `start` up to `end` as they are stored, or in `dtype` where that differs."""
        found = []
        for part in self.parts:
            size = len(part)
            if start < size and end > 0:
                found.append(part[max(start, 0) : min(end, size)].to(self.dtype))
            start, end = start - size, end - size
        return found[0] if len(found) == 1 else torch.cat(found)


class DenseFormat:
    """Matrices stored in a float dtype, held in the dtype of the activations."""

    name = "dense"
    wide_activations = False

    def __init__(self, *, packs: bool = False) -> None:
        self.packs = packs

    def packing(self, *, wide_activations: bool = False) -> DenseFormat:
        """The same; matrices stay where they are stored until a kernel packs them."""
        return DenseFormat(packs=True)

    def names(self, source: TensorSource) -> list[str]:
        """Tensors are stored under their names."""
        return list(source.keys())

    def covers(self, source: TensorSource, key: str) -> bool:
        """Every tensor can be dense."""
        return True

    def tensors(self, source: TensorSource, key: str) -> tuple[str, ...]:
        """A matrix is one tensor."""
        return (key,)

    def shape(self, source: TensorSource, key: str) -> tuple[int, ...]:
        """As stored."""
        return source.shape(key)

    def scheme(self, source: TensorSource, keys: Sequence[str], shard: Shard = WHOLE) -> None:
        """Dense matrices have none."""
        return

    def table(self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype) -> None:
        """Token tables are read as they are."""
        return

    def load(self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype) -> Weight:
        """Read one matrix, or a shard of it, into memory of its own in `dtype`, unless it `packs`.

        Raises:
            CheckpointError: the tensor is missing, unreadable or no matrix.
            UnsupportedModel: it is stored as integers or 8-bit floats, which mean nothing without
                the scales of a quantization format.
        """
        stored = source.read(key, shard)
        if stored.dim() != 2:
            raise CheckpointError(
                f"tensor `{key}` has shape {tuple(stored.shape)}, but a matrix is needed here",
                hint="the weights and `config.json` do not belong together; download both again",
            )
        if stored.dtype not in FLOATS:
            raise UnsupportedModel(
                f"tensor `{key}` is stored as {str(stored.dtype).removeprefix('torch.')} and "
                "`config.json` names no quantization method that would explain it",
                hint="use the checkpoint in bfloat16, float16 or float32, or a GGUF file of it",
            )
        if self.packs:
            return StoredDense([stored], dtype)
        # A copy even in the same dtype: what `read` gives may be a view of a mapped file, unaligned
        # and gone with a fault if the file is cut short under us.
        return DenseWeight(stored.to(dtype, copy=True, memory_format=torch.contiguous_format))

    def column_unit(self, source: TensorSource, key: str) -> int:
        """Every input stands alone."""
        return 1

    def fuse(self, parts: Sequence[Weight]) -> Weight:
        """Stack matrices of equal `in_features` along the output."""
        stored = [part for part in parts if isinstance(part, StoredDense)]
        if len(stored) == len(parts):
            return StoredDense([part for each in stored for part in each.parts], stored[0].dtype)
        return DenseWeight(torch.cat([part.dequantize() for part in parts]))
