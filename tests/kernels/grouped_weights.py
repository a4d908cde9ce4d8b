"""Random grouped matrices, and what their product by rounded activations is, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_cli.kernels.grouped import Grouped, GroupScheme


class RandomGroups:
    """A `GroupedRows` of random codes, scales and minima."""

    wide_activations = False
    order: Tensor | None = None

    def __init__(self, scheme: GroupScheme, rows: int, columns: int) -> None:
        generator = torch.Generator().manual_seed(rows * 1000 + columns)
        shape = (rows, columns // scheme.group)
        codes = torch.randint(0, 1 << scheme.bits, (rows, columns), generator=generator)
        if scheme.codes == "e4m3":
            codes[codes % 128 == 127] = 0  # NaN
        scales = torch.randn(shape, generator=generator) / (1 << scheme.bits)
        minima = torch.randn(shape, generator=generator)
        self.scheme = scheme
        self.out_features, self.in_features = rows, columns
        self._whole = Grouped(
            codes.byte(),
            scales.to(scheme.scale),
            minima.to(scheme.scale) if scheme.minimum else None,
        )

    def rows(self, start: int, end: int) -> Grouped:
        codes, scales, minima = self._whole.codes, self._whole.scales, self._whole.minima
        return Grouped(
            codes[start:end], scales[start:end], None if minima is None else minima[start:end]
        )

    def replace(self, codes: Tensor, scales: Tensor) -> None:
        """Others of the same scheme, which has no minima."""
        self.out_features, self.in_features = codes.shape
        self._whole = Grouped(codes, scales.to(self.scheme.scale))

    def dequantize(self) -> Tensor:
        return self.scheme.decode(self._whole)


def minima_of(weight: RandomGroups) -> Tensor:
    """Magnitude of each weight's minimum, float64 [rows, columns]."""
    minima = weight.rows(0, weight.out_features).minima
    assert minima is not None
    return minima.double().abs().repeat_interleave(weight.scheme.group, 1)


def rounded_activations(x: Tensor) -> Tensor:
    """[m, k] as the kernels see it: 8 bits and one scale for each 32 inputs, in float64."""
    groups = x.float().view(len(x), -1, 32)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 1e-30, torch.full_like(largest, 127.0) / largest, 0.0)
    scale = largest * torch.tensor(1 / 127, dtype=torch.float32)
    return ((groups * inverse).round().double() * scale.double()).view(len(x), -1)


def exact_product(x: Tensor, weight: RandomGroups) -> Tensor:
    return rounded_activations(x) @ weight.dequantize().double().T


def magnitude(x: Tensor, weight: RandomGroups) -> Tensor:
    """Sum of the magnitudes of each element's summands: what rounding errors are relative to."""
    return rounded_activations(x).abs() @ weight.dequantize().double().abs().T
