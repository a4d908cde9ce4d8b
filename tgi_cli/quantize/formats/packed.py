"""What all packed formats share: matrices as stored, their shards, and how they multiply.

A format file says how one matrix's tensors mean numbers (`StoredMatrix`); this one slices such
matrices, stacks them and hands them to a kernel, or decodes them. Knows no layout of any format.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from tgi_cli.errors import CheckpointError, UsageError
from tgi_cli.kernels.grouped import Grouped, GroupScheme
from tgi_cli.quantize.formats.base import WHOLE, Shard, TensorSource, Weight
from tgi_cli.quantize.formats.dense import FLOATS, DenseFormat, DenseWeight

#: Inputs that native kernels take at once; groups of every scheme divide it or are made of it.
RUN = 32
#: Rows decoded at a time: intermediates stay small beside the matrix.
ROWS_AT_ONCE = 512


class StoredMatrix(Protocol):
    """One matrix as it lies in a checkpoint, usually in a mapped file; nothing is copied.

    `scheme` is what a kernel may hold it in without loss, None if there is no such kernel. `group`
    is the number of inputs that share a scale, which a shard must not cut; 1 if any cut will do.
    `order` is None, or the input that each column of `rows` belongs to, as int64 [in_features].
    """

    in_features: int
    out_features: int
    nbytes: int
    group: int
    scheme: GroupScheme | None
    order: Tensor | None

    def decode(self, start: int, end: int) -> Tensor:
        """Rows `start` up to `end` in float32."""
        ...

    def rows(self, start: int, end: int) -> Grouped:
        """The same rows in `scheme`."""
        ...


class Slice:
    """A shard of a stored matrix, as a stored matrix."""

    def __init__(self, whole: StoredMatrix, shard: Shard, key: str) -> None:
        self._whole = whole
        size = whole.out_features if shard.dim == 0 else whole.in_features
        start, end = shard.bounds(size)
        self._first_row = start if shard.dim == 0 else 0
        self._columns = (start, end) if shard.dim == 1 else (0, whole.in_features)
        if any(edge % whole.group for edge in self._columns if edge != whole.in_features):
            raise UsageError(
                f"matrix `{key}` shares scales among {whole.group} inputs, and {shard.world_size} "
                f"shards of its {whole.in_features:,} inputs would cut such a group",
                hint="use fewer shards, or a checkpoint with smaller groups",
            )
        self.in_features = self._columns[1] - self._columns[0]
        self.out_features = end - start if shard.dim == 0 else whole.out_features
        self.nbytes = whole.nbytes // shard.world_size
        self.group = whole.group
        scheme, self.order = whole.scheme, whole.order
        if shard.dim == 1 and whole.order is not None:
            scheme, self.order = None, None  # its groups have inputs in other shards
        self._rows_share = scheme is not None and scheme.group == whole.in_features
        self.scheme = scheme and cut(scheme, whole.in_features, *self._columns)

    def decode(self, start: int, end: int) -> Tensor:
        """See `StoredMatrix.decode`."""
        first, (left, right) = self._first_row, self._columns
        return self._whole.decode(first + start, first + end)[:, left:right]

    def rows(self, start: int, end: int) -> Grouped:
        """See `StoredMatrix.rows`."""
        assert self.scheme is not None
        first, (left, right) = self._first_row, self._columns
        found, size = self._whole.rows(first + start, first + end), self.scheme.group
        groups = slice(None) if self._rows_share else slice(left // size, right // size)
        minima = found.minima
        return Grouped(
            found.codes[:, left:right],
            found.scales[:, groups],
            None if minima is None else minima[:, groups],
        )


def cut(scheme: GroupScheme, in_features: int, start: int, end: int) -> GroupScheme | None:
    """The scheme of inputs `start` up to `end` of a matrix; None if a group or a run is cut."""
    if scheme.group == in_features:  # one scale for a whole row is that of every part of it
        unit, scheme = RUN, replace(scheme, group=end - start)
    else:
        unit = max(scheme.group, RUN)
    return None if start % unit or end % unit else scheme


def decoded(matrix: StoredMatrix, dtype: torch.dtype) -> Tensor:
    """The whole matrix in `dtype`, some rows at a time."""
    out = torch.empty((matrix.out_features, matrix.in_features), dtype=dtype)
    for start in range(0, matrix.out_features, ROWS_AT_ONCE):
        end = min(matrix.out_features, start + ROWS_AT_ONCE)
        out[start:end] = matrix.decode(start, end)
    return out


class GroupedWeight:
    """Stored matrices of one scheme, stacked along the output and left as they are.

    Made for a backend that packs it (`kernels.grouped.GroupedRows`). Until then it multiplies by
    decoding itself each time, which is right and slow. `dtype` is that of the activations.
    """

    def __init__(
        self, parts: Sequence[StoredMatrix], dtype: torch.dtype, *, wide_activations: bool = False
    ) -> None:
        schemes = {part.scheme for part in parts}
        scheme = schemes.pop()
        if schemes or scheme is None or not _one_order(parts):
            raise ValueError("only matrices of one scheme and order can be stacked")
        self.parts = tuple(parts)
        self.scheme = scheme
        self.order = parts[0].order
        self.dtype = dtype
        self.wide_activations = wide_activations
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        self.nbytes = sum(part.nbytes for part in parts)

    def matmul(self, x: Tensor, ops: Any) -> Tensor:
        """Decode, then multiply [tokens, in_features] to [tokens, out_features] in x's dtype."""
        product: Tensor = ops.linear(x, self.dequantize().to(x.dtype))
        return product

    def prepare(self, ops: Any, out: Tensor | None = None) -> Weight:
        """Return self, or the dense matrix if there is a place for it."""
        return self if out is None else DenseWeight(out.copy_(self.dequantize()))

    def dequantize(self) -> Tensor:
        """Return the dense matrix in float32, exact."""
        return torch.cat([decoded(part, torch.float32) for part in self.parts])

    def rows(self, start: int, end: int) -> Grouped:
        """Codes and scales of rows `start` up to `end`."""
        found = []
        for part in self.parts:
            size = part.out_features
            if start < size and end > 0:
                found.append(part.rows(max(start, 0), min(end, size)))
            start, end = start - size, end - size
        if len(found) == 1:
            return found[0]
        minima = [rows.minima for rows in found if rows.minima is not None]
        return Grouped(
            torch.cat([rows.codes for rows in found]),
            torch.cat([rows.scales for rows in found]),
            torch.cat(minima) if minima else None,
        )


class Rows(Protocol):
    """A stored matrix whose rows can be taken in any order."""

    def gather(self, indices: Tensor) -> Tensor:
        """Rows [n] int64 in float32."""
        ...


class GroupedTable(GroupedWeight):
    """A token table that stays packed."""

    def __init__(
        self,
        part: StoredMatrix,
        lookup: Rows,
        dtype: torch.dtype,
        *,
        wide_activations: bool = False,
    ) -> None:
        super().__init__([part], dtype, wide_activations=wide_activations)
        self._lookup = lookup

    def gather(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode some rows: [n] int64 -> [n, in_features]."""
        return self._lookup.gather(indices).to(dtype)


def stack(parts: Sequence[Weight]) -> Weight:
    """Stack along the output: packed where all are of one scheme and order, else dense."""
    grouped = [part for part in parts if isinstance(part, GroupedWeight)]
    stored = [each for part in grouped for each in part.parts]
    one_scheme = len({part.scheme for part in grouped}) == 1
    if len(grouped) == len(parts) and one_scheme and _one_order(stored):
        first = grouped[0]
        return GroupedWeight(
            stored,
            first.dtype,
            wide_activations=first.wide_activations,
        )
    return DenseFormat().fuse(
        [
            DenseWeight(part.dequantize().to(part.dtype))
            if isinstance(part, GroupedWeight)
            else part
            for part in parts
        ]
    )


def _one_order(parts: Sequence[StoredMatrix]) -> bool:
    first, *others = (part.order for part in parts)
    if first is None:
        return all(other is None for other in others)
    return all(other is not None and torch.equal(first, other) for other in others)


class PackedFormat(ABC):
    """A format that stores a matrix `X.weight` in several tensors, beside plain ones.

    `endings` are what those tensors have in the place of `.weight`; each packed matrix, and no
    plain one, has one of `marks`. `ignored` are endings of tensors that say nothing about weights:
    scales of activations, which are rounded by their own size here, and of an 8-bit KV cache.
    """

    name: str
    endings: tuple[str, ...]
    marks: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    packs = False
    wide_activations = False

    @abstractmethod
    def stored(self, source: TensorSource, key: str) -> StoredMatrix:
        """The matrix `key` as it is stored, its tensors checked against each other.

        Raises:
            CheckpointError: a tensor is missing or has a wrong shape or dtype.
        """

    def packing(self, *, wide_activations: bool = False) -> Self:
        """See `Format.packing`."""
        made = copy(self)
        made.packs, made.wide_activations = True, wide_activations
        return made

    def names(self, source: TensorSource) -> list[str]:
        """See `Format.names`."""
        names: dict[str, None] = {}
        for key in source.keys():  # noqa: SIM118 - a source is no dictionary
            if key.endswith(self.ignored):
                continue
            found = next((end for end in self.endings if key.endswith(end)), None)
            names[key if found is None else key.removesuffix(found) + ".weight"] = None
        return list(names)

    def covers(self, source: TensorSource, key: str) -> bool:
        """See `Format.covers`."""
        return any(self.stem(key) + mark in source for mark in self.marks)

    def tensors(self, source: TensorSource, key: str) -> tuple[str, ...]:
        """See `Format.tensors`."""
        if not self.covers(source, key):
            return (key,)
        found = (self.stem(key) + ending for ending in self.endings)
        return tuple(name for name in found if name in source)

    def shape(self, source: TensorSource, key: str) -> tuple[int, ...]:
        """See `Format.shape`."""
        if not self.covers(source, key):
            return source.shape(key)
        matrix = self.stored(source, key)
        return matrix.out_features, matrix.in_features

    def scheme(
        self, source: TensorSource, keys: Sequence[str], shard: Shard = WHOLE
    ) -> GroupScheme | None:
        """See `Format.scheme`."""
        if not self.packs or not all(self.covers(source, key) for key in keys):
            return None
        matrices = [self.stored(source, key) for key in keys]
        if shard.dim == 1:
            matrices = [
                Slice(matrix, shard, key) for matrix, key in zip(matrices, keys, strict=True)
            ]
        schemes = {matrix.scheme for matrix in matrices}
        return schemes.pop() if len(schemes) == 1 and _one_order(matrices) else None

    def load(self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype) -> Weight:
        """Read one matrix, or a shard of it: as stored if it is kept so, else decoded.

        Raises:
            CheckpointError: a tensor is missing, unreadable or inconsistent.
            UsageError: the shard cuts a group.
        """
        if not self.covers(source, key):
            if source.read(key).dtype not in FLOATS:
                raise wrong(key, f"is packed, but what `{self.name}` stores beside it is missing")
            return DenseFormat(packs=self.packs).load(source, key, shard, dtype)
        matrix = self.stored(source, key)
        if shard.dim is not None and shard.world_size > 1:
            matrix = Slice(matrix, shard, key)
        if self.packs and matrix.scheme is not None:
            return GroupedWeight([matrix], dtype, wide_activations=self.wide_activations)
        return DenseWeight(decoded(matrix, dtype))

    def table(self, source: TensorSource, key: str, shard: Shard, dtype: torch.dtype) -> None:
        """No checkpoint of these formats packs its token table."""
        return

    def column_unit(self, source: TensorSource, key: str) -> int:
        """Whole groups, and whole runs of inputs where a kernel multiplies them."""
        if not self.covers(source, key):
            return 1
        matrix = self.stored(source, key)
        return math.lcm(matrix.group, RUN if self.packs and matrix.scheme is not None else 1)

    def fuse(self, parts: Sequence[Weight]) -> Weight:
        """Stack matrices of equal `in_features`; those of different schemes become dense."""
        return stack(parts)

    def stem(self, key: str) -> str:
        """What the names of a matrix's tensors begin with."""
        return key.removesuffix(".weight")


def tensor(
    source: TensorSource,
    key: str,
    dtypes: torch.dtype | Sequence[torch.dtype],
    *shapes: tuple[int, ...],
) -> Tensor:
    """Read a tensor that must have one of these dtypes and, if any are given, shapes.

    Raises:
        CheckpointError: it is missing, unreadable or other than that.
    """
    allowed = [dtypes] if isinstance(dtypes, torch.dtype) else list(dtypes)
    found = source.read(key, WHOLE)
    if found.dtype not in allowed:
        words = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise wrong(key, f"has dtype {str(found.dtype).removeprefix('torch.')}, not {words}")
    if shapes and tuple(found.shape) not in shapes:
        words = " or ".join(map(str, shapes))
        raise wrong(key, f"has shape {tuple(found.shape)}, but {words} is needed")
    return found


def finite(key: str, scales: Tensor) -> Tensor:
    """The scales, which were read from `key`.

    Raises:
        CheckpointError: one is infinite or not a number.
    """
    if not scales.isfinite().all():
        raise wrong(key, "holds scales that are not finite")
    return scales


def wrong(key: str, what: str) -> CheckpointError:
    """An error that names a tensor."""
    return CheckpointError(
        f"tensor `{key}` {what}",
        hint="the checkpoint is damaged, or its quantization_config describes another one",
    )
