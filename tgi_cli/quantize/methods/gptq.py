"""GPTQ: codes chosen column by column, each column's error made good by those still open.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023. Columns are taken in the order of their inputs' energy while every column
keeps the grid of the group it stands in ("static groups"): the quality of act-order without a
permutation at run time. Knows no layers and no files.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tgi_cli.errors import CheckpointError
from tgi_cli.quantize.methods.matrix import QuantizedMatrix

DAMPING = 0.01  # of the mean diagonal, added to the diagonal
_BLOCK = 128  # columns between two updates of all columns to the right


class Codebook(Protocol):
    """The values that codes stand for; `scales` and `zeros` are [rows, groups]."""

    @property
    def scales(self) -> Tensor:
        """In float32."""
        ...

    @property
    def zeros(self) -> Tensor:
        """Codes of zero, in float32."""
        ...

    def rounded(self, values: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes, and what they stand for, of [rows] with the scale and zero of each."""
        ...

    def matrix(self, codes: Tensor) -> QuantizedMatrix:
        """The matrix of these codes, [rows, columns] float32."""
        ...


def solve(
    weight: Tensor, moments: Tensor, grid: Codebook, *, damping: float = DAMPING
) -> QuantizedMatrix:
    """Quantize `weight` on `grid` so that outputs change little for inputs with these moments.

    Args:
        weight: [rows, columns] float32; rows do not influence each other.
        moments: [columns, columns] float32, the sum of x xT over the calibration inputs.
        grid: what codes stand for, with groups in the columns' stored order.
        damping: fraction of the mean diagonal added to the diagonal.

    Raises:
        CheckpointError: weights or inputs are not finite.
    """
    if not (weight.isfinite().all() and moments.isfinite().all()):
        raise CheckpointError(
            "weights or activations are not finite, so they cannot be quantized",
            hint="the checkpoint is broken, or it overflows in float32 on this calibration text",
        )
    columns = weight.shape[1]
    size = columns // grid.scales.shape[1]
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(moments[order][:, order], damping)
    group_of = order // size
    # Columns as rows of a transposed copy: each is contiguous.
    open_columns = weight.T[order].contiguous()
    scales, zeros = grid.scales.T[group_of], grid.zeros.T[group_of]
    codes = torch.empty_like(open_columns)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        block = open_columns[start:end]
        within = factor[start:end, start:end]
        errors = torch.empty_like(block)
        for index in range(end - start):
            column, scale, zero = block[index], scales[start + index], zeros[start + index]
            code, value = grid.rounded(column, scale, zero)
            codes[start + index] = code
            error = (column - value).div_(within[index, index])
            errors[index] = error
            block[index + 1 :].addr_(within[index, index + 1 :], error, alpha=-1)
        open_columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    stored = torch.empty_like(codes)
    stored[order] = codes
    return grid.matrix(stored.T.contiguous())


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moments.

    Inputs that were never seen get the mean energy: their columns are rounded to nearest. Damping
    grows where float32 cannot factor the matrix.
    """
    diagonal = moments.diagonal()
    mean = float(diagonal.mean()) or 1.0
    unseen = torch.where(diagonal == 0, mean, 0.0)
    while True:
        damped = moments + torch.diag(unseen + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
        damping *= 10
