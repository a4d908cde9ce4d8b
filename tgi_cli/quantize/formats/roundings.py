"""How rows of a dense matrix are rounded: one small class for each method of `--quantize`.

No calibration and no look at other rows, so that rows can be rounded whenever they are needed.
Scales come first in the precision in which they are kept; codes are those nearest under them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tgi_cli.kernels.grouped import INT4, INT8, TABLES, Grouped, GroupScheme, wide
from tgi_cli.quantize.formats.packed import RUN

_LARGEST = 448.0  # of E4M3


class Rounding(Protocol):
    """Rounds rows in float32; `unit` is what their length must be a multiple of."""

    unit: int

    def scheme(self, columns: int) -> GroupScheme:
        """What rows of this length become."""
        ...

    def grouped(self, rows: Tensor) -> Grouped:
        """Rows [n, columns] in that scheme."""
        ...


class Int8Groups:
    """8 bits with a scale for each 32 inputs: the largest magnitude / 127 (GGUF's Q8_0)."""

    unit = INT8.group

    def scheme(self, columns: int) -> GroupScheme:
        """See `Rounding.scheme`."""
        return INT8

    def grouped(self, rows: Tensor) -> Grouped:
        """See `Rounding.grouped`."""
        groups = rows.view(len(rows), -1, INT8.group)
        scales = (groups.abs().amax(-1, keepdim=True) / 127).to(INT8.scale)
        codes = _steps(groups, scales.float(), -127, 127) + INT8.zero_point
        return Grouped(codes.to(torch.uint8).flatten(1), scales.flatten(1))


class Int8Rows:
    """8 bits with one scale for each output: EETQ's and LLM.int8's weights."""

    unit = RUN

    def scheme(self, columns: int) -> GroupScheme:
        """See `Rounding.scheme`."""
        return wide(8, columns)

    def grouped(self, rows: Tensor) -> Grouped:
        """See `Rounding.grouped`."""
        scales = rows.abs().amax(-1, keepdim=True) / 127
        codes = _steps(rows, scales, -127, 127) + 128
        return Grouped(codes.to(torch.uint8), scales)


class Int4Groups:
    """4 bits with a scale for each 32 inputs.

    As in GGUF's Q4_0 the value of largest magnitude becomes the code -8, or lies a little inside or
    outside of the range; then the scale is set to what fits the codes best in the least squares.
    Of these tries the one with the least error is kept: 9 % below that of Q4_0.
    """

    unit = INT4.group
    _reaches = (1.0, 0.88, 1.12)  # of the range, against that of the largest magnitude

    def scheme(self, columns: int) -> GroupScheme:
        """See `Rounding.scheme`."""
        return INT4

    def grouped(self, rows: Tensor) -> Grouped:
        """See `Rounding.grouped`."""
        groups = rows.view(len(rows), -1, INT4.group)
        widest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
        scales = widest
        least = torch.full_like(widest, torch.inf)
        for reach in self._reaches:
            steps = _steps(groups, widest * reach, -8, 7)
            weight = (steps * steps).sum(-1, keepdim=True)
            fitted = (groups * steps).sum(-1, keepdim=True)
            gain = torch.where(weight > 0, fitted * fitted / weight, 0.0)  # squared error less this
            better = -gain < least
            least = torch.where(better, -gain, least)
            scales = torch.where(better & (weight > 0), fitted / weight, scales)
        kept = scales.to(INT4.scale)
        codes = _steps(groups, kept.float(), -8, 7) + INT4.zero_point
        return Grouped(codes.to(torch.uint8).flatten(1), kept.flatten(1))


class TableBlocks:
    """4-bit indices into one of `kernels.grouped.TABLES`, with a float32 scale for each block."""

    def __init__(self, table: str, block: int = 64) -> None:
        self.unit = block
        self._table = table
        values, codes = torch.tensor(TABLES[table]).sort()
        # In order, so that the nearest value is found between neighbours.
        self._between = (values[1:] + values[:-1]) / 2
        self._codes = codes.to(torch.uint8)

    def scheme(self, columns: int) -> GroupScheme:
        """See `Rounding.scheme`."""
        return wide(4, self.unit, codes=self._table)

    def grouped(self, rows: Tensor) -> Grouped:
        """See `Rounding.grouped`."""
        blocks = rows.view(len(rows), -1, self.unit)
        scales = blocks.abs().amax(-1, keepdim=True)
        normal = torch.where(scales > 0, blocks / scales, 0.0)
        codes = self._codes[torch.bucketize(normal, self._between)]
        return Grouped(codes.flatten(1), scales.flatten(1))


class Float8Rows:
    """E4M3 with a float32 scale for each output: the largest magnitude / 448."""

    unit = RUN

    def scheme(self, columns: int) -> GroupScheme:
        """See `Rounding.scheme`."""
        return wide(8, columns, codes="e4m3")

    def grouped(self, rows: Tensor) -> Grouped:
        """See `Rounding.grouped`."""
        scales = rows.abs().amax(-1, keepdim=True) / _LARGEST
        normal = torch.where(scales > 0, rows / scales, 0.0).clamp(-_LARGEST, _LARGEST)
        return Grouped(normal.to(torch.float8_e4m3fn).view(torch.uint8), scales)


def decoded(rounding: Rounding, rows: Tensor) -> Tensor:
    """What rounded rows of any length stand for, in float32."""
    columns = rows.shape[1]
    padded = torch.nn.functional.pad(rows, (0, -columns % rounding.unit))
    return rounding.scheme(padded.shape[1]).decode(rounding.grouped(padded))[:, :columns]


def _steps(values: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
    """Signed codes; 0 where the scale is 0."""
    return torch.where(scales != 0, values / scales, 0.0).round_().clamp_(lowest, highest)
