"""How rows of a dense matrix are rounded: one small class for each method of `--quantize`.

No calibration and no look at other rows, so that rows can be rounded whenever they are needed.
Scales come first in the precision in which they are kept; codes are those nearest under them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tgi_cli.kernels.grouped import INT4, INT8, Grouped, GroupScheme

#: bitsandbytes' NF4: quantiles of a normal distribution (Dettmers et al., QLoRA, 2023).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
#: bitsandbytes' FP4: three bits of magnitude, the upper half negative.
_FP4 = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4 = (*_FP4, *(-value for value in _FP4))

_LARGEST = 448.0  # of E4M3


class Rounding(Protocol):
    """Rounds rows in float32 [rows, inputs]. `scheme` is None where no kernel holds the result.

    `group` inputs share a scale; None for all of a row.
    """

    scheme: GroupScheme | None
    group: int | None

    def grouped(self, rows: Tensor) -> Grouped:
        """The rounded rows in `scheme`; the inputs are whole groups of it."""
        ...

    def decoded(self, rows: Tensor) -> Tensor:
        """What the rounded rows stand for, in float32."""
        ...


class Int8Groups:
    """8 bits with a scale for each 32 inputs: the largest magnitude / 127 (GGUF's Q8_0)."""

    scheme: GroupScheme | None = INT8
    group: int | None = INT8.group

    def grouped(self, rows: Tensor) -> Grouped:
        """See `Rounding.grouped`."""
        groups = rows.view(len(rows), -1, INT8.group)
        scales = self._scales(groups)
        codes = _steps(groups, scales.float(), 127) + INT8.zero_point
        return Grouped(codes.to(torch.uint8).flatten(1), scales.flatten(1))

    def decoded(self, rows: Tensor) -> Tensor:
        """See `Rounding.decoded`."""
        return _of_whole_groups(rows, INT8, self)

    def _scales(self, groups: Tensor) -> Tensor:
        """Scales [rows, groups, 1] of groups [rows, groups, 32]."""
        return (groups.abs().amax(-1, keepdim=True) / 127).to(INT8.scale)


class Int8Rows(Int8Groups):
    """8 bits with one scale for each output: EETQ's and LLM.int8's weights."""

    group: int | None = None

    def _scales(self, groups: Tensor) -> Tensor:
        largest = groups.abs().amax((-1, -2), keepdim=True)
        return (largest / 127).to(INT8.scale).expand(-1, groups.shape[1], 1)


class Int4Groups:
    """4 bits with a scale for each 32 inputs.

    As GGUF's Q4_0 the value of largest magnitude becomes the code -8; then the scale is twice set
    to what fits these codes best in the least squares, which takes 3 % off the error.
    """

    scheme: GroupScheme | None = INT4
    group: int | None = INT4.group

    def grouped(self, rows: Tensor) -> Grouped:
        """See `Rounding.grouped`."""
        groups = rows.view(len(rows), -1, INT4.group)
        scales = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
        for _ in range(2):
            steps = _steps(groups, scales, 7)
            weight = (steps * steps).sum(-1, keepdim=True)
            best = (groups * steps).sum(-1, keepdim=True) / weight
            scales = torch.where(weight > 0, best, scales)
        kept = scales.to(INT4.scale)
        codes = _steps(groups, kept.float(), 7) + INT4.zero_point
        return Grouped(codes.to(torch.uint8).flatten(1), kept.flatten(1))

    def decoded(self, rows: Tensor) -> Tensor:
        """See `Rounding.decoded`."""
        return _of_whole_groups(rows, INT4, self)


class TableBlocks:
    """4-bit indices into a table, with a float32 scale for each block: NF4 and FP4."""

    scheme: GroupScheme | None = None

    def __init__(self, table: tuple[float, ...], block: int = 64) -> None:
        self.group: int | None = block
        self._block = block
        # Sorted, so that the nearest value is found between neighbours.
        self._values = torch.tensor(sorted(table))

    def grouped(self, rows: Tensor) -> Grouped:
        """No scheme holds such codes."""
        raise ValueError("table indices are no integers in groups")

    def decoded(self, rows: Tensor) -> Tensor:
        """See `Rounding.decoded`."""
        blocks = _padded(rows, self._block).view(len(rows), -1, self._block)
        scales = blocks.abs().amax(-1, keepdim=True)
        normal = torch.where(scales > 0, blocks / scales, 0.0)
        between = (self._values[1:] + self._values[:-1]) / 2
        nearest = self._values[torch.bucketize(normal, between)]
        return (nearest * scales).flatten(1)[:, : rows.shape[1]]


class Float8Rows:
    """E4M3 with a float32 scale for each output: the largest magnitude / 448."""

    scheme: GroupScheme | None = None
    group: int | None = None

    def grouped(self, rows: Tensor) -> Grouped:
        """No scheme holds such numbers."""
        raise ValueError("8-bit floats are no integers in groups")

    def decoded(self, rows: Tensor) -> Tensor:
        """See `Rounding.decoded`."""
        scales = rows.abs().amax(-1, keepdim=True) / _LARGEST
        normal = torch.where(scales > 0, rows / scales, 0.0).clamp(-_LARGEST, _LARGEST)
        return normal.to(torch.float8_e4m3fn).float() * scales


def _steps(groups: Tensor, scales: Tensor, largest: int) -> Tensor:
    """Signed codes from -largest - 1 (-127 for 8 bits) to `largest`; 0 where the scale is 0."""
    lowest = -largest if largest == 127 else -largest - 1
    return torch.where(scales != 0, groups / scales, 0.0).round_().clamp_(lowest, largest)


def _padded(rows: Tensor, size: int) -> Tensor:
    """Zeros at the end of rows, up to whole groups."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % size))


def _of_whole_groups(rows: Tensor, scheme: GroupScheme, rounding: Rounding) -> Tensor:
    columns = rows.shape[1]
    return scheme.decode(rounding.grouped(_padded(rows, scheme.group)))[:, :columns]
