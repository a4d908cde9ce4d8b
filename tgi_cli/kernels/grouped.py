"""Matrices of small integers with a scale for each group of inputs: what native kernels multiply.

A stored format that fits one of the schemes says so by giving `GroupedRows`; how it is packed for a
kernel is that kernel's business. Knows no file and no format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

#: Values of 4-bit float codes: bitsandbytes' NF4 and FP4 (Dettmers et al., 2023), and E2M1 of the
#: OCP microscaling formats.
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
        0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
        -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
    "e2m1": (
        0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
        -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GroupScheme:
    """How codes mean weights: `(code - zero_point) * scale`, or `code * scale + minimum`.

    Codes are unsigned integers of `bits`; `group` inputs of one output share a scale of dtype
    `scale` (float16, bfloat16 or float32) and, if the scheme has them, a minimum of the same dtype.
    Where `codes` is not `integer`, they stand for numbers: of `TABLES`, or `e4m3`, 8-bit floats
    without NaN.

    A group is 16 or 32 inputs, or any multiple of 32 with float32 scales.
    """

    bits: int
    group: int
    scale: torch.dtype
    minimum: bool
    codes: str = "integer"

    @property
    def zero_point(self) -> int:
        """The code of zero where there are no minima."""
        return 0 if self.minimum or self.codes != "integer" else 1 << (self.bits - 1)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of codes, scales and minima."""
        scales = rows * (columns // self.group) * self.scale.itemsize
        return rows * columns * self.bits // 8 + scales * (2 if self.minimum else 1)

    def decode(self, grouped: Grouped) -> Tensor:
        """The weights: float32 [rows, columns], exact."""
        rows, columns = grouped.codes.shape
        weights = self.values(grouped.codes).view(rows, -1, self.group)
        weights = weights * grouped.scales.float().unsqueeze(-1)
        if grouped.minima is not None:
            weights += grouped.minima.float().unsqueeze(-1)
        return weights.view(rows, columns)

    def values(self, codes: Tensor) -> Tensor:
        """What uint8 codes stand for before scale and minimum, float32."""
        if self.codes == "integer":
            return codes.float() - self.zero_point
        if self.codes == "e4m3":
            return codes.view(torch.float8_e4m3fn).float()
        return torch.tensor(TABLES[self.codes])[codes.long()]


#: GGUF's Q8_0, Q5_0 and IQ4_NL; Q4_0; Q4_1; Q4_K; Q5_1 and Q5_K; Q3_K and Q6_K.
INT8 = GroupScheme(8, 32, torch.float16, minimum=False)
INT4 = GroupScheme(4, 32, torch.float16, minimum=False)
INT4_MINIMUM = GroupScheme(4, 32, torch.float16, minimum=True)
INT4_MINIMUM_FLOAT = GroupScheme(4, 32, torch.float32, minimum=True)
INT8_MINIMUM_FLOAT = GroupScheme(8, 32, torch.float32, minimum=True)
INT8_HALF_GROUPS = GroupScheme(8, 16, torch.float32, minimum=False)
#: MXFP4, whose scales are powers of two: bfloat16 has all that float32 has.
MXFP4 = GroupScheme(4, 32, torch.bfloat16, minimum=False, codes="e2m1")


def wide(bits: int, group: int, *, minimum: bool = False, codes: str = "integer") -> GroupScheme:
    """A scheme with float32 scales for any multiple of 32 inputs, up to a whole row."""
    return GroupScheme(bits, group, torch.float32, minimum, codes)


@dataclass(frozen=True, slots=True)
class Grouped:
    """Rows of a matrix: `codes` uint8 [rows, columns], `scales` and `minima` [rows, groups]."""

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None


@runtime_checkable
class GroupedRows(Protocol):
    """A weight that can give itself as groups, some rows at a time.

    `wide_activations` asks to multiply integers by bf16 activations instead of int8 ones. Where the
    inputs of a group are not side by side, `order` [in_features] says which input each column of
    `rows` belongs to; else it is None.
    """

    in_features: int
    out_features: int
    scheme: GroupScheme
    wide_activations: bool
    order: Tensor | None

    def rows(self, start: int, end: int) -> Grouped:
        """Rows `start` up to `end`."""
        ...


@runtime_checkable
class FloatRows(Protocol):
    """A weight that can give its rows as floats, some at a time."""

    in_features: int
    out_features: int

    def float_rows(self, start: int, end: int) -> Tensor:
        """Rows `start` up to `end`, perhaps a view of a mapped file."""
        ...
