"""Matrices of small integers with a scale for each group of inputs: what native kernels multiply.

A stored format that fits one of the schemes says so by giving `GroupedRows`; how it is packed for a
kernel is that kernel's business. Knows no file and no format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupScheme:
    """How codes mean weights: `(code - zero_point) * scale`, or `code * scale + minimum`.

    Codes are unsigned integers of `bits`; `group` inputs of one output share a scale of dtype
    `scale` (float16 or float32) and, if the scheme has them, a minimum of the same dtype.
    """

    bits: int
    group: int
    scale: torch.dtype
    minimum: bool

    @property
    def zero_point(self) -> int:
        """The code of zero where there are no minima."""
        return 0 if self.minimum else 1 << (self.bits - 1)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of codes, scales and minima."""
        scales = rows * (columns // self.group) * self.scale.itemsize
        return rows * columns * self.bits // 8 + scales * (2 if self.minimum else 1)

    def decode(self, grouped: Grouped) -> Tensor:
        """The weights: float32 [rows, columns], exact."""
        rows, columns = grouped.codes.shape
        codes = grouped.codes.view(rows, -1, self.group).float() - self.zero_point
        weights = codes * grouped.scales.float().unsqueeze(-1)
        if grouped.minima is not None:
            weights += grouped.minima.float().unsqueeze(-1)
        return weights.view(rows, columns)


#: GGUF's Q8_0, Q5_0 and IQ4_NL; Q4_0; Q4_1; Q4_K; Q5_1 and Q5_K; Q3_K and Q6_K.
INT8 = GroupScheme(8, 32, torch.float16, minimum=False)
INT4 = GroupScheme(4, 32, torch.float16, minimum=False)
INT4_MINIMUM = GroupScheme(4, 32, torch.float16, minimum=True)
INT4_MINIMUM_FLOAT = GroupScheme(4, 32, torch.float32, minimum=True)
INT8_MINIMUM_FLOAT = GroupScheme(8, 32, torch.float32, minimum=True)
INT8_HALF_GROUPS = GroupScheme(8, 16, torch.float32, minimum=False)


@dataclass(frozen=True, slots=True)
class Grouped:
    """Rows of a matrix: `codes` uint8 [rows, columns], `scales` and `minima` [rows, groups]."""

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None


@runtime_checkable
class GroupedRows(Protocol):
    """A weight that can give itself as groups, some rows at a time."""

    in_features: int
    out_features: int
    scheme: GroupScheme

    def rows(self, start: int, end: int) -> Grouped:
        """Rows `start` up to `end`."""
        ...
