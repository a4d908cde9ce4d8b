"""A quantized matrix between the method that made it and the layout that stores it.

Knows no packing and no file: codes are one element each.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """Codes with a scale (and a zero point) for each group of inputs.

    Stands for `(codes - zeros) * scales`, computed in float32.

    Attributes:
        codes: [out, in]; uint8 in 0 ... 2**bits - 1, or float8_e4m3fn.
        scales: [out, groups] in the dtype they are stored in.
        zeros: [out, groups] uint8; None for floating-point codes.
        bits: bits of a code.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """The matrix this stands for: [out, in] float32."""
        rows, columns = self.codes.shape
        values = self.codes.float().view(rows, self.scales.shape[1], -1)
        if self.zeros is not None:
            values = values - self.zeros.float().unsqueeze(2)
        return (values * self.scales.float().unsqueeze(2)).view(rows, columns)

    def rows(self, start: int, end: int) -> QuantizedMatrix:
        """Output rows `start` ... `end` - 1: one part of stacked matrices."""
        return QuantizedMatrix(
            self.codes[start:end],
            self.scales[start:end],
            None if self.zeros is None else self.zeros[start:end],
            self.bits,
        )
