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
from tgi_cli.quantize.formats.base import Shard, TensorSource, Weight

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


class DenseFormat:
    """Matrices stored in a float dtype, held in the dtype of the activations."""

    name = "dense"
    packs = False
    wide_activations = False

    def packing(self, *, wide_activations: bool = False) -> DenseFormat:
        """Nothing can be packed."""
        return self

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

    def scheme(self, source: TensorSource, keys: Sequence[str]) -> None:
        """Dense matrices have none."""
        return

    def table(self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype) -> None:
        """Token tables are read as they are."""
        return

    def load(self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype) -> DenseWeight:
        """Read one matrix, or a shard of it, into memory of its own in `dtype`.

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
        # A copy even in the same dtype: what `read` gives may be a view of a mapped file, unaligned
        # and gone with a fault if the file is cut short under us.
        return DenseWeight(stored.to(dtype, copy=True, memory_format=torch.contiguous_format))

    def column_unit(self, source: TensorSource, key: str) -> int:
        """Every input stands alone."""
        return 1

    def fuse(self, parts: Sequence[Weight]) -> DenseWeight:
        """Stack matrices of equal `in_features` along the output."""
        return DenseWeight(torch.cat([part.dequantize() for part in parts]))
