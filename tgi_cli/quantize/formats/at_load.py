"""Dense checkpoints whose matrices are rounded while they are read: `--quantize int8` and others.

Nothing is rounded before a kernel packs it, some rows at a time and from the mapped file, so that
no second copy of the model is ever in memory. How rows are rounded is the business of `roundings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tgi_cli.kernels.grouped import Grouped, GroupScheme
from tgi_cli.quantize.formats.base import WHOLE, Shard, TensorSource, Weight
from tgi_cli.quantize.formats.dense import DenseFormat, DenseWeight
from tgi_cli.quantize.formats.packed import (
    RUN,
    GroupedTable,
    GroupedWeight,
    Slice,
    StoredMatrix,
    cut,
    decoded,
    stack,
)
from tgi_cli.quantize.formats.roundings import (
    Float8Rows,
    Int4Groups,
    Int8Groups,
    Int8Rows,
    Rounding,
    TableBlocks,
)
from tgi_cli.quantize.formats.roundings import decoded as rounded


@dataclass(frozen=True, slots=True)
class Method:
    """How the layers' matrices are rounded, and how the token table and the head are.

    None leaves these two as they are: methods of 4-bit floats never touch them.
    """

    layers: Rounding
    ends: Rounding | None


METHODS: dict[str, Method] = {
    "int8": Method(Int8Groups(), Int8Groups()),
    # Both ends show most in the answers, so they keep 8 bits.
    "int4": Method(Int4Groups(), Int8Groups()),
    "eetq": Method(Int8Rows(), Int8Groups()),
    "bitsandbytes": Method(Int8Rows(), Int8Groups()),
    "bitsandbytes-nf4": Method(TableBlocks("nf4"), None),
    "bitsandbytes-fp4": Method(TableBlocks("fp4"), None),
    "fp8": Method(Float8Rows(), None),
}


class RoundedMatrix:
    """A dense matrix that gives itself rounded (see `packed.StoredMatrix`)."""

    def __init__(self, dense: Tensor, rounding: Rounding) -> None:
        self.out_features, self.in_features = dense.shape
        self.nbytes = dense.nbytes
        scheme = rounding.scheme(self.in_features)
        self.scheme: GroupScheme | None = scheme if self.in_features % rounding.unit == 0 else None
        self.order: Tensor | None = None
        # One scale for a whole row is that of every part of it.
        self.group = 1 if scheme.group == self.in_features else scheme.group
        self._dense, self._rounding = dense, rounding

    def decode(self, start: int, end: int) -> Tensor:
        """Rounded rows in float32."""
        return rounded(self._rounding, self._dense[start:end].float())

    def rows(self, start: int, end: int) -> Grouped:
        """Rounded rows in `scheme`."""
        return self._rounding.grouped(self._dense[start:end].float())

    def gather(self, indices: Tensor) -> Tensor:
        """Some rows, rounded: [n] int64 -> [n, in_features] float32."""
        return rounded(self._rounding, self._dense[indices].float())


@dataclass
class AtLoadFormat:
    """`name` is a method; `ends` are the names of the token table and the head."""

    name: str
    ends: tuple[str, str]
    packs: bool = False
    wide_activations: bool = False

    def packing(self, *, wide_activations: bool = False) -> AtLoadFormat:
        """See `Format.packing`."""
        return replace(self, packs=True, wide_activations=wide_activations)

    def names(self, source: TensorSource) -> list[str]:
        """The checkpoint is dense."""
        return list(source.keys())

    def covers(self, source: TensorSource, key: str) -> bool:
        """Whether the method rounds this tensor."""
        matrix = key.endswith(".weight") and key in source and len(source.shape(key)) == 2
        return matrix and self._rounding(key) is not None

    def tensors(self, source: TensorSource, key: str) -> tuple[str, ...]:
        """A matrix is one tensor."""
        return (key,)

    def shape(self, source: TensorSource, key: str) -> tuple[int, ...]:
        """As stored."""
        return source.shape(key)

    def scheme(
        self, source: TensorSource, keys: Sequence[str], shard: Shard = WHOLE
    ) -> GroupScheme | None:
        """See `Format.scheme`."""
        if not self.packs or not all(self.covers(source, key) for key in keys):
            return None
        rounding, columns = self._rounding(keys[0]), source.shape(keys[0])[1]
        if rounding is None or columns % rounding.unit:
            return None
        bounds = shard.bounds(columns) if shard.dim == 1 else (0, columns)
        return cut(rounding.scheme(columns), columns, *bounds)

    def load(self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype) -> Weight:
        """A matrix that will be rounded, or one that was, dense in `dtype`.

        Raises:
            CheckpointError: the tensor is missing, unreadable or no matrix.
        """
        rounding = self._rounding(key)
        if rounding is None or not self.covers(source, key):
            return DenseFormat(packs=self.packs).load(source, key, shard, dtype)
        matrix = self._matrix(source, key, shard, rounding)
        if self.packs and matrix.scheme is not None:
            return GroupedWeight([matrix], dtype, wide_activations=self.wide_activations)
        return DenseWeight(decoded(matrix, dtype))

    def table(
        self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype
    ) -> GroupedTable | None:
        """The token table, if the method rounds it and a kernel will hold it."""
        rounding = self._rounding(key)
        if rounding is None or self.scheme(source, [key]) is None:
            return None
        matrix = RoundedMatrix(source.read(key, shard), rounding)
        return GroupedTable(matrix, matrix, dtype, wide_activations=self.wide_activations)

    def column_unit(self, source: TensorSource, key: str) -> int:
        """Whole groups, and whole runs of inputs where a kernel multiplies them."""
        rounding = self._rounding(key)
        if rounding is None or not self.covers(source, key):
            return 1
        columns = source.shape(key)[1]
        group = rounding.scheme(columns).group
        packed = self.scheme(source, [key]) is not None
        return max(1 if group == columns else group, RUN if packed else 1)

    def fuse(self, parts: Sequence[Weight]) -> Weight:
        """Stack matrices of equal `in_features`."""
        return stack(parts)

    def _rounding(self, key: str) -> Rounding | None:
        method = METHODS[self.name]
        return method.ends if key in self.ends else method.layers

    def _matrix(
        self, source: TensorSource, key: str, shard: Shard, rounding: Rounding
    ) -> StoredMatrix:
        if shard.dim == 1 and shard.world_size > 1:  # a scale may be that of a whole row
            return Slice(RoundedMatrix(source.read(key), rounding), shard, key)
        return RoundedMatrix(source.read(key, shard), rounding)
