"""Matrices repacked for the native kernels, behind the same calls as the dense ones.

A packed matrix still multiplies by itself, so the Python composition runs on it too, and can give
back the dense matrix it stands for. Knows no roles; the interleaving of gate and up is an order of
rows that `dequantize` and `matmul` undo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tgi_cli.kernels.cpu.library import (
    PANEL,
    Context,
    Embed,
    Gemm,
    Matrix,
    PackGrouped,
    pointer,
)
from tgi_cli.kernels.grouped import (
    INT4,
    INT4_MINIMUM,
    INT4_MINIMUM_FLOAT,
    INT8,
    INT8_HALF_GROUPS,
    INT8_MINIMUM_FLOAT,
    MXFP4,
    Grouped,
    GroupedRows,
    GroupScheme,
)

#: Form in csrc/kernels.h: rows of bf16, panels of bf16, and the grouped ones.
ROWS, BF16 = 0, 1
FORMS = {
    INT8: 2,
    INT4: 3,
    INT4_MINIMUM: 4,
    INT4_MINIMUM_FLOAT: 5,
    INT8_MINIMUM_FLOAT: 6,
    INT8_HALF_GROUPS: 7,
    MXFP4: 16,
}
#: Wide forms, by codes, bits and whether there are minima.
_WIDE = {
    ("integer", 4, False): 8,
    ("integer", 4, True): 9,
    ("integer", 8, False): 10,
    ("integer", 8, True): 11,
    ("nf4", 4, False): 12,
    ("fp4", 4, False): 13,
    ("e2m1", 4, False): 14,
    ("e4m3", 8, False): 15,
}
_RUN = 32  # inputs that are stored, and whose activations are rounded, together
_ELEMENTS = 1 << 19  # decoded and packed at a time: intermediates stay in a core's cache

_STORE = {torch.float32: 0, torch.bfloat16: 1}  # Epilogue in csrc/kernels.h


def panels(rows: int) -> int:
    """Number of panels for so many output features."""
    return -(-rows // PANEL)


def interleave(rows: Tensor) -> Tensor:
    """[2n, ...] gate then up -> alternating runs of 16 gate rows and 16 up rows."""
    gate, up = rows.chunk(2)
    shape = (-1, PANEL // 2, *rows.shape[1:])
    return torch.stack([gate.reshape(shape), up.reshape(shape)], dim=1).reshape(rows.shape)


def deinterleave(rows: Tensor) -> Tensor:
    """Undo `interleave`."""
    pairs = rows.reshape(-1, 2, PANEL // 2, *rows.shape[1:])
    return torch.cat([pairs[:, 0].flatten(0, 1), pairs[:, 1].flatten(0, 1)])


def matrix_bytes(scheme: GroupScheme | None, rows: int, columns: int) -> int:
    """Bytes of a packed matrix: in bf16, or by its scheme."""
    rows = panels(rows) * PANEL
    return rows * columns * 2 if scheme is None else scheme.nbytes(rows, columns)


def form_of(scheme: GroupScheme) -> int:
    """The form in csrc/kernels.h that holds a scheme.

    Raises:
        ValueError: there is none.
    """
    form = FORMS.get(scheme)
    if form is None and scheme.scale == torch.float32 and scheme.group % _RUN == 0:
        form = _WIDE.get((scheme.codes, scheme.bits, scheme.minimum))
    if form is None:
        raise ValueError(f"no packed form holds {scheme}")
    return form


class PackedWeight:
    """A matrix in panels of `PANEL` outputs; `data` is laid out as its form in `csrc` says.

    `scheme` is None for bf16. Grouped integers multiply activations rounded to int8, or with
    `wide_activations` bf16 ones, as floats always do. `order` is that of `GroupedRows`.
    """

    def __init__(
        self,
        context: Context,
        shape: tuple[int, int],
        data: Tensor,
        scheme: GroupScheme | None,
        *,
        interleaved: bool,
        wide_activations: bool = False,
        order: Tensor | None = None,
    ) -> None:
        self.out_features, self.in_features = shape
        self.scheme = scheme
        self.interleaved = interleaved
        self.data = data
        self.nbytes = data.nbytes
        self._context = context
        self._form = BF16 if scheme is None else form_of(scheme)
        self._wide_activations = wide_activations
        self._order = order

    @classmethod
    def empty(
        cls,
        context: Context,
        shape: tuple[int, int],
        scheme: GroupScheme | None,
        *,
        interleaved: bool = False,
        wide_activations: bool = False,
        order: Tensor | None = None,
        data: Tensor | None = None,
    ) -> PackedWeight:
        """A matrix of this shape to be filled, in `data` (uint8 of its `matrix_bytes`) if given.

        Raises:
            ValueError: a scheme's `in_features` is no multiple of 32.
        """
        rows, columns = shape
        if scheme is not None and columns % _RUN:
            raise ValueError(f"{columns} inputs are no multiple of {_RUN}")
        if data is None:
            data = context.buffer(matrix_bytes(scheme, rows, columns))
        if scheme is None:
            data = data.view(torch.bfloat16).view(panels(rows), columns // 2, PANEL, 2)
        return cls(
            context,
            shape,
            data,
            scheme,
            interleaved=interleaved,
            wide_activations=wide_activations,
            order=None if order is None else order.to(torch.int32).contiguous(),
        )

    @classmethod
    def dense(cls, context: Context, weight: Tensor, *, interleaved: bool = False) -> PackedWeight:
        """Pack a bf16 [out_features, in_features] matrix."""
        rows, columns = weight.shape
        made = cls.empty(context, (rows, columns), None, interleaved=interleaved)
        for start, end in made.parts():
            made.fill(lambda first, last: weight[first:last], start, end)
        return made

    @classmethod
    def grouped(
        cls,
        context: Context,
        weight: GroupedRows,
        *,
        interleaved: bool = False,
        wide_activations: bool = False,
    ) -> PackedWeight:
        """Pack a grouped matrix, some panels at a time; `in_features` is a multiple of 32."""
        made = cls.empty(
            context,
            (weight.out_features, weight.in_features),
            weight.scheme,
            interleaved=interleaved,
            wide_activations=wide_activations,
            order=weight.order,
        )
        for start, end in made.parts():
            made.fill(weight.rows, start, end)
        return made

    def parts(self) -> list[tuple[int, int]]:
        """Bounds of rows, whole panels each, for `fill`: in any order, on any thread."""
        unit = 2 * PANEL
        step = max(unit, _ELEMENTS // self.in_features // unit * unit)
        bounds = range(0, self.out_features, step)
        return [(start, min(self.out_features, start + step)) for start in bounds]

    def fill(self, rows: Callable[[int, int], Any], start: int, end: int) -> None:
        """Pack the rows `start` up to `end` of the panels.

        Args:
            rows: gives rows of the matrix as it is stored: floats, or with a scheme `Grouped`.
            start: first row, a multiple of `PANEL`.
            end: one after the last, another multiple or `out_features`.
        """
        if not self.interleaved:
            found = (rows(start, end),)
        else:  # panels hold as many rows of gate as of up
            half = self.out_features // 2
            found = tuple(rows(at + start // 2, at + end // 2) for at in (0, half))
        if self.scheme is None:
            self._fill_floats([each.bfloat16() for each in found], start, end)
        else:
            self._fill_groups(found, start, end)

    @property
    def matrix(self) -> Matrix:
        """The C struct; it points to `data`."""
        return self._matrix(self.data.data_ptr(), self.out_features)

    def matmul(self, x: Tensor, ops: Any) -> Tensor:
        """[tokens, in_features] bf16 -> [tokens, out_features] bf16."""
        out = self._product(x, torch.bfloat16)
        return deinterleave(out.T).T if self.interleaved else out

    def matmul_float(self, x: Tensor) -> Tensor:
        """The same product without the last rounding: float32."""
        out = self._product(x, torch.float32)
        return deinterleave(out.T).T if self.interleaved else out

    def embed(self, token_ids: Tensor, scale: float) -> Tensor:
        """Rows of the matrix, scaled: [tokens] int64 -> [tokens, in_features] float32."""
        out = torch.empty((len(token_ids), self.in_features))
        ids, tokens = pointer(token_ids), len(token_ids)
        self._context.call("embed", Embed(self.matrix, ids, pointer(out), tokens, scale))
        return out

    def prepare(self, ops: Any, out: Tensor | None = None) -> PackedWeight:
        """Already prepared."""
        return self

    def gather(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows: [n] int64 -> [n, in_features]; not of an interleaved matrix."""
        return self.embed(indices, 1.0).to(dtype)

    def dequantize(self) -> Tensor:
        """The dense matrix: bf16, or float32 where it is grouped."""
        rows, columns = self.out_features, self.in_features
        if self.scheme is None:
            dense = self.data.permute(0, 2, 1, 3).reshape(-1, columns)
        else:
            dense = self.scheme.decode(self._unpacked(self.scheme))
        if self._order is not None:
            dense = dense[:, self._order.argsort()]
        return deinterleave(dense[:rows]) if self.interleaved else dense[:rows].contiguous()

    def _matrix(self, address: int, rows: int) -> Matrix:
        group = 0 if self.scheme is None else self.scheme.group
        wide = int(self._wide_activations)
        order = pointer(self._order)
        return Matrix(address, rows, self.in_features, self._form, group, wide, order)

    def _fill_floats(self, found: list[Tensor], start: int, end: int) -> None:
        rows = found[0] if len(found) == 1 else interleave(torch.cat(found))
        self._context.pack(rows.contiguous(), self.data[start // PANEL : panels(end)])

    def _fill_groups(self, found: tuple[Grouped, ...], start: int, end: int) -> None:
        def whole(name: str) -> Tensor | None:
            parts = [part for each in found if (part := getattr(each, name)) is not None]
            if len(parts) < len(found):
                return None
            rows: Tensor = parts[0] if len(parts) == 1 else interleave(torch.cat(parts))
            return rows.contiguous()

        offset = matrix_bytes(self.scheme, start, self.in_features)
        codes, scales, minima = (whole(name) for name in ("codes", "scales", "minima"))
        target = self._matrix(self.data.data_ptr() + offset, end - start)
        self._context.pack_grouped(
            PackGrouped(target, pointer(codes), pointer(scales), pointer(minima))
        )

    def _unpacked(self, scheme: GroupScheme) -> Grouped:
        """Codes, scales and minima out of the panels."""
        size, parts = max(_RUN, scheme.group), max(1, _RUN // scheme.group)
        groups = self.in_features // size
        count = panels(self.out_features)
        data = self.data.view(count, groups, -1)
        split = PANEL * size * scheme.bits // 8
        codes = data[:, :, :split].reshape(count, groups, -1, PANEL, 4)
        if scheme.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=3).flatten(2, 3)
        elif scheme.codes == "e4m3":  # pairs of inputs lie together: see csrc/grouped.inc.h
            pairs = codes.view(count, groups, -1, PANEL // 4, 2, 4, 2)
            codes = pairs.permute(0, 1, 2, 3, 5, 6, 4).reshape(codes.shape)
        codes = codes.permute(0, 3, 1, 2, 4).reshape(count * PANEL, -1)
        floats = data[:, :, split:].contiguous().view(scheme.scale)
        floats = floats.view(count, groups, -1, PANEL).permute(0, 3, 1, 2)

        def rows(part: Tensor) -> Tensor:
            return part.reshape(count * PANEL, -1)

        minima = rows(floats[..., parts:]) if scheme.minimum else None
        return Grouped(codes, rows(floats[..., :parts]), minima)

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.in_features or x.dtype != torch.bfloat16:
            raise ValueError(
                f"activations must be bfloat16 [tokens, {self.in_features}], "
                f"not {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            )
        x = x.contiguous()
        tokens, n, k = x.shape[0], self.out_features, self.in_features
        out = torch.empty((tokens, n), dtype=dtype)
        arguments = Gemm(pointer(x), self.matrix, None, pointer(out), tokens, k, n, _STORE[dtype])
        self._context.call("gemm", arguments)
        return out


class PackedHead:
    """The output matrix, packed: logits leave it in float32."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] bf16 -> [n, vocab_size] float32."""
        return self.weight.matmul_float(hidden)


class PackedEmbedding:
    """The token table in the packed matrix of the head that is tied to it."""

    def __init__(self, weight: PackedWeight, scale: float | None) -> None:
        self.weight = weight
        self.scale = scale
        self.dtype = torch.bfloat16

    def forward(self, token_ids: Tensor) -> Tensor:
        """[tokens] -> [tokens, hidden_size] bf16."""
        return self.weight.embed(token_ids, self.scale or 1.0).bfloat16()
