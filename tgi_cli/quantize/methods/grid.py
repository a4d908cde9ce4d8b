"""Grids of representable values: a scale and a zero point for each row and group of inputs.

`fit` chooses them, by the extremes of the weights or by the least error a clipped range makes.
Knows nothing of how codes are chosen on a grid (nearest, or GPTQ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_cli.quantize.methods.matrix import QuantizedMatrix

#: Fractions of a group's range that `fit` tries: weights beyond are clipped.
SHRINKS = tuple(1.0 - 0.025 * step for step in range(21))
_CHUNK_ELEMENTS = 1 << 18  # rows are searched in parts that stay in the cache
_WHOLE = 512  # inputs of a group from which on only their energies count: the rest is cubic work


@dataclass(frozen=True, slots=True)
class Grid:
    """`levels` values a group: code q stands for `(q - zero) * scale`.

    `scales` [rows, groups] are float32 values that `scale_dtype` represents; `zeros` like it,
    whole numbers.
    """

    bits: int
    scales: Tensor
    zeros: Tensor
    scale_dtype: torch.dtype

    @property
    def highest(self) -> int:
        """The largest code."""
        return int(2**self.bits) - 1

    def rounded(self, values: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """See `gptq.Codebook.rounded`."""
        codes = (values / scales).round_().add_(zeros).clamp_(0, self.highest)
        return codes, (codes - zeros).mul_(scales)

    def nearest(self, weight: Tensor) -> QuantizedMatrix:
        """Round each element of [rows, columns] to the nearest value."""
        rows, columns = weight.shape
        groups = weight.reshape(rows, self.scales.shape[1], -1)
        codes = _codes(groups, self.scales, self.zeros, self.highest)
        return self.matrix(codes.view(rows, columns))

    def matrix(self, codes: Tensor) -> QuantizedMatrix:
        """The matrix of these codes, [rows, columns] of any dtype."""
        return QuantizedMatrix(
            codes.to(torch.uint8),
            self.scales.to(self.scale_dtype),
            self.zeros.to(torch.uint8),
            self.bits,
        )


def fit(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    moments: Tensor | None = None,
    shrinks: tuple[float, ...] = SHRINKS,
) -> Grid:
    """Choose scales and zero points for `weight`.

    Args:
        weight: [rows, columns] float32.
        bits: of a code.
        group_size: inputs that share a scale; divides `columns`. -1 is a whole row.
        symmetric: fixes the zero point in the middle, at 2**(bits - 1).
        scale_dtype: scales are rounded to it first, so that codes are chosen for what is stored.
        moments: second moments of the inputs, [columns, columns]. With them the range of each
            group is shrunk by the factor of `shrinks` that changes the group's own part of the
            output least (of large groups, as if inputs were independent); without them it spans
            the weights' extremes.
        shrinks: what to try.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = weight.reshape(rows, columns // size, size)
    blocks = None
    if moments is not None:
        if size >= _WHOLE:
            blocks = moments.diagonal().view(columns // size, size)
        else:
            cut = moments.view(columns // size, size, columns // size, size)
            blocks = cut.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    step = max(1, _CHUNK_ELEMENTS // columns)
    parts = [
        _fit_rows(part, bits, symmetric, scale_dtype, blocks, shrinks)
        for part in torch.split(groups, step)
    ]
    scales, zeros = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return Grid(bits, scales, zeros, scale_dtype)


def _fit_rows(
    groups: Tensor,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    blocks: Tensor | None,
    shrinks: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """Scales and zeros of [rows, groups, size]."""
    highest = 2**bits - 1
    low, high = groups.amin(2).clamp(max=0.0), groups.amax(2).clamp(min=0.0)
    best_scales, best_zeros = _range(low, high, highest, symmetric, scale_dtype)
    if blocks is None:
        return best_scales, best_zeros
    least = _loss(groups, best_scales, best_zeros, highest, blocks)
    for shrink in shrinks:
        scales, zeros = _range(low * shrink, high * shrink, highest, symmetric, scale_dtype)
        loss = _loss(groups, scales, zeros, highest, blocks)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def _range(
    low: Tensor, high: Tensor, highest: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a grid from `low` to `high`, which has zero on it."""
    width = 2 * torch.maximum(-low, high) if symmetric else high - low
    scales = width / highest
    scales = scales.clamp(min=torch.finfo(scale_dtype).tiny).to(scale_dtype).float()
    if symmetric:
        return scales, torch.full_like(scales, (highest + 1) // 2)
    return scales, (-low / scales).round().clamp(0, highest)


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor, highest: int) -> Tensor:
    steps = (groups / scales.unsqueeze(2)).round_()
    return steps.add_(zeros.unsqueeze(2)).clamp_(0, highest)


def _loss(groups: Tensor, scales: Tensor, zeros: Tensor, highest: int, blocks: Tensor) -> Tensor:
    """How much rounding moves each group's part of the output, squared and summed: [rows, groups].

    With inputs x that have moments `blocks` = sum of x xT this is dT blocks d for difference d;
    `blocks` is [groups, size, size], or [groups, size] for the diagonals alone.
    """
    codes = _codes(groups, scales, zeros, highest)
    moved = codes.sub_(zeros.unsqueeze(2)).mul_(scales.unsqueeze(2)).sub_(groups)
    if blocks.dim() == 2:
        return torch.einsum("rgi,gi->rg", moved.square_(), blocks)
    by_group = moved.transpose(0, 1)  # [groups, rows, size]
    return ((by_group @ blocks) * by_group).sum(2).transpose(0, 1)
